//! What can go wrong on the way to a GPU, each with its remedy.

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
    #[error("CUDA: the NVIDIA driver has no {symbol}; driver 525 or newer is needed, please update it")]
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
    #[error("CUDA: no kernels for a device of compute capability {major}.{minor}: this build has {built}")]
    NoImage {
        /// Compute capability.
        major: u32,
        /// Compute capability.
        minor: u32,
        /// The targets of the images.
        built: String,
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
    /// The kernels cannot be loaded during a capture.
    #[error(
        "CUDA: the first call on a device loads its kernels, which a graph cannot capture; call once before capturing"
    )]
    Capturing,
    /// A kernel is not in any loaded image.
    #[error("CUDA: no kernel {name} in the images of this device; please report this")]
    NoKernel {
        /// Its entry point.
        name: String,
    },
    /// More than the kernels can count, or hold.
    #[error("{what}: expected at most {limit} on a GPU, got {given}")]
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
    #[error("CUDA: {name} in {call}: {text}")]
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
