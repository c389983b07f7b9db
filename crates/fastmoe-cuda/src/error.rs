//! What can go wrong on the way to a GPU, each with its remedy.

use std::ffi::c_int;

/// A failure of the CUDA backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// libcuda cannot be loaded.
    #[error("CUDA: no NVIDIA driver on this machine ({reason}); install one, or keep the tensors on the CPU")]
    NoDriver {
        /// What the dynamic loader said.
        reason: String,
    },
    /// libcuda lacks a function.
    #[error("CUDA: the NVIDIA driver has no {symbol}; driver 580 or newer is needed, please update it")]
    MissingSymbol {
        /// The function.
        symbol: &'static str,
    },
    /// The images in this build are for newer drivers.
    #[error(
        "CUDA: the NVIDIA driver is too old for these kernels: it supports CUDA {}.{}, CUDA {}.{} is needed \
         (driver 580 or newer)",
        given / 1000, given % 1000 / 10, wanted / 1000, wanted % 1000 / 10
    )]
    DriverTooOld {
        /// `1000 * major + 10 * minor` that the driver supports.
        given: i32,
        /// The same, of the compiler of the images.
        wanted: i32,
    },
    /// There is no such device.
    #[error("CUDA: no device {device}; this machine has {count}")]
    NoDevice {
        /// The ordinal asked for.
        device: i32,
        /// How many there are.
        count: i32,
    },
    /// No image runs on this device.
    #[error(
        "CUDA: no kernels for a device of compute capability {major}.{minor}: this build has {built}, and GPUs from \
         Ampere (8.0) on are served; keep the tensors on the CPU, or install a build for this device"
    )]
    NoImage {
        /// Compute capability.
        major: u32,
        /// Compute capability.
        minor: u32,
        /// The targets of the images.
        built: String,
    },
    /// The driver refuses an image.
    #[error(
        "CUDA: {name} in {call}: the driver does not run the kernels of this build on this device; update the driver, \
         or keep the tensors on the CPU"
    )]
    ImageRefused {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
    },
    /// `FASTMOE_BACKEND` asks for an emulator that is not there.
    #[error("FASTMOE_BACKEND=emulator: {reason}; unset it to use the CPU backend")]
    NoEmulator {
        /// Why not.
        reason: String,
    },
    /// The emulator found a fault in a kernel.
    #[error("{0}")]
    Emulator(String),
    /// Not while a graph is captured.
    #[error(
        "CUDA: {call} cannot be captured in a graph: call once before capturing, as the first call on a device loads \
         its kernels, and without FASTMOE_CHECK=1, which waits for the device"
    )]
    Capturing {
        /// The driver's function.
        call: &'static str,
    },
    /// A kernel is not in any loaded image.
    #[error("CUDA: no kernel {name} in the images of this device; please report this")]
    NoKernel {
        /// Its entry point.
        name: String,
    },
    /// More than the kernels can count, or hold.
    #[error("{what}: got {given}, wanted at most {limit} on a GPU")]
    TooLarge {
        /// The size.
        what: &'static str,
        /// What it is.
        given: usize,
        /// The largest that kernels take.
        limit: usize,
    },
    /// Device memory ran out.
    #[error("CUDA: out of memory in {call}; free tensors or make the batch smaller, then try again")]
    OutOfMemory {
        /// The driver's function.
        call: &'static str,
    },
    /// The context is beyond repair.
    #[error(
        "CUDA: {name} in {call}: a kernel failed on the device, which stays unusable until the process restarts"
    )]
    Sticky {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
    },
    /// Any other answer of the driver.
    #[error("CUDA: {name} in {call}: {text}; python -m fastmoe_rs doctor examines the machine")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the error.
        name: String,
        /// The driver's description of it.
        text: String,
    },
}

/// A result of the CUDA backend.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a function of the driver returns (`CUresult`).
pub(crate) type Status = c_int;

/// Makes an error of a status; `texts` has the driver's name of it, and its description.
pub(crate) fn check(
    call: &'static str,
    status: Status,
    texts: impl FnOnce() -> (String, String),
) -> Result<()> {
    match status {
        0 => return Ok(()),
        2 => return Err(Error::OutOfMemory { call }),
        900 => return Err(Error::Capturing { call }),
        _ => {}
    }
    let (name, text) = texts();
    Err(match status {
        // No binary for the device, invalid PTX, no compiler of PTX, PTX of a newer version.
        209 | 218 | 221 | 222 => Error::ImageRefused { call, name },
        // Nothing works in the context after an uncorrectable ECC error, an illegal address, a launch timeout, an
        // assert, a hardware stack error, an illegal instruction, a misaligned address, a wrong address space, a wrong
        // program counter, or a failed launch.
        214 | 700 | 702 | 710 | 714..=719 => Error::Sticky { call, name },
        _ => Error::Driver { call, name, text },
    })
}
