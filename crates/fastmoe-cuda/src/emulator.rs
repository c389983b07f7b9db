//! The emulator of `cuda/emulator` as a driver: the kernels run on the CPU, every access checked.
//!
//! `FASTMOE_EMULATOR_FAULT=cuLaunchKernel=719` makes it fail as a driver does whose function returns this status.

use crate::driver::{Access, Device, Driver, Kernel, MapSpec, Region, Stream, TensorMap};
use crate::error::{self, Error, Result};
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

type Text = *const c_char;

/// The functions of `cuda/emulator/api.h`.
struct Emulator {
    launch: unsafe extern "C" fn(Text, i64, *const c_void, usize) -> Text,
    kernel: unsafe extern "C" fn(Text, *mut u32, *mut u32, *mut usize) -> Text,
    name: unsafe extern "C" fn(usize) -> Text,
    add_range: unsafe extern "C" fn(*const c_void, usize, Text, c_int),
    remove_range: unsafe extern "C" fn(*const c_void),
    tensor_map: unsafe extern "C" fn(
        *mut TensorMap,
        *const c_void,
        u32,
        u64,
        u64,
        u64,
        u64,
        u64,
        u32,
        u32,
        c_int,
    ) -> Text,
    /// It runs one launch at a time.
    turn: Mutex<()>,
    names: OnceLock<Vec<&'static CStr>>,
    /// `FASTMOE_EMULATOR_LAUNCH=none`: launches do nothing, which leaves what a call costs on the host.
    idle: bool,
    _library: Library,
}

/// The emulator, from the library that `FASTMOE_EMULATOR` names.
pub fn open() -> Result<Box<dyn Driver>> {
    Ok(Box::new(Emulator::open()?))
}

/// Fails where that function of the driver is asked to.
fn may_fail(call: &'static str) -> Result<()> {
    let Ok(fault) = std::env::var("FASTMOE_EMULATOR_FAULT") else { return Ok(()) };
    match fault.split_once('=') {
        Some((faulty, status)) if faulty == call => {
            let status = status.parse().expect("FASTMOE_EMULATOR_FAULT ends in a number");
            error::check(call, status, || (format!("error {status}"), "asked for".to_owned()))
        }
        _ => Ok(()),
    }
}

fn missing(reason: impl ToString) -> Error {
    Error::NoEmulator { reason: reason.to_string() }
}

impl Emulator {
    fn open() -> Result<Self> {
        let path = std::env::var_os("FASTMOE_EMULATOR")
            .ok_or_else(|| missing("FASTMOE_EMULATOR has to name the library of `make emulator`"))?;
        // SAFETY: the library of the emulator, whose initialisers only fill its table of kernels, and its functions.
        unsafe {
            let library = Library::new(path).map_err(missing)?;
            Ok(Self {
                launch: *library.get(b"emulator_launch\0").map_err(missing)?,
                kernel: *library.get(b"emulator_kernel\0").map_err(missing)?,
                name: *library.get(b"emulator_kernel_name\0").map_err(missing)?,
                add_range: *library.get(b"emulator_add_range\0").map_err(missing)?,
                remove_range: *library.get(b"emulator_remove_range\0").map_err(missing)?,
                tensor_map: *library.get(b"emulator_tensor_map\0").map_err(missing)?,
                turn: Mutex::default(),
                names: OnceLock::new(),
                idle: std::env::var("FASTMOE_EMULATOR_LAUNCH").is_ok_and(|launch| launch == "none"),
                _library: library,
            })
        }
    }

    fn names(&self) -> &[&'static CStr] {
        self.names.get_or_init(|| {
            let name = |index| {
                // SAFETY: the emulator gives a static name, or null past the last kernel; it is never unloaded.
                unsafe {
                    let name = (self.name)(index);
                    (!name.is_null()).then(|| CStr::from_ptr(name))
                }
            };
            (0..).map_while(name).collect()
        })
    }

    fn check(message: Text) -> Result<()> {
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: a message ends in a zero and lives until this thread's next call.
        let text = unsafe { CStr::from_ptr(message) };
        Err(Error::Emulator(text.to_string_lossy().into_owned()))
    }
}

impl Driver for Emulator {
    fn version(&self) -> Result<i32> {
        Ok(0)
    }

    fn device_count(&self) -> Result<i32> {
        Ok(1)
    }

    fn device(&self, _: i32) -> Result<Device> {
        Ok(Device {
            name: "emulator".to_owned(),
            capability: (9, 0),
            multiprocessors: 3,
            shared_per_block: 227 << 10,
        })
    }

    fn load(&self, _: i32) -> Result<HashMap<&'static str, Kernel>> {
        let names = self.names().iter().enumerate();
        names
            .map(|(function, name)| {
                let (mut threads, mut shared, mut bytes) = (0, 0, 0);
                // SAFETY: the name ends in a zero and the outputs point to locals.
                Self::check(unsafe { (self.kernel)(name.as_ptr(), &mut threads, &mut shared, &mut bytes) })?;
                let name = name.to_str().expect("symbols are ASCII");
                Ok((name, Kernel { function, threads, shared }))
            })
            .collect()
    }

    fn tensor_map(&self, _: i32, spec: &MapSpec) -> Result<TensorMap> {
        let mut map = TensorMap::NONE;
        if self.idle {
            return Ok(map);
        }
        may_fail("cuTensorMapEncodeTiled")?;
        let base = spec.address as *const c_void;
        let [width, height, depth] = spec.sizes.map(|size| size as u64);
        let [row, matrix] = spec.strides();
        let (element, box_width) = (MapSpec::ELEMENT as u32, MapSpec::BOX_WIDTH);
        // SAFETY: the map is a local of 128 bytes, aligned to 64; the emulator does not look at the tensor.
        Self::check(unsafe {
            (self.tensor_map)(
                &mut map,
                base,
                element,
                width,
                height,
                depth,
                row,
                matrix,
                box_width,
                spec.box_height,
                1,
            )
        })?;
        Ok(map)
    }

    unsafe fn launch(
        &self,
        _: i32,
        _: Stream,
        kernel: Kernel,
        blocks: u32,
        params: &[u8],
        memory: &[Region],
    ) -> Result<()> {
        if self.idle {
            return Ok(());
        }
        may_fail("cuLaunchKernel")?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut given: Vec<&Region> = memory.iter().filter(|region| region.bytes > 0).collect();
        // A tensor may be given twice, or be a part of another.
        given.sort_by_key(|region| (region.start, std::cmp::Reverse(region.bytes)));
        given.dedup_by_key(|region| region.start);
        given.dedup_by(|region, other| region.start + region.bytes <= other.start + other.bytes);
        let names: Vec<CString> =
            given.iter().map(|region| CString::new(region.name).expect("names have no zeros")).collect();
        // SAFETY: as promised by the caller; names and ranges outlive the launch, and the ranges are taken back.
        unsafe {
            for (region, name) in given.iter().zip(&names) {
                let use_ = match region.access {
                    Access::Read => 0,
                    Access::Write => 1,
                    Access::ReadWrite => 2,
                };
                (self.add_range)(region.start as *const c_void, region.bytes, name.as_ptr(), use_);
            }
            let name = self.names()[kernel.function];
            let message = (self.launch)(name.as_ptr(), blocks.into(), params.as_ptr().cast(), params.len());
            let result = Self::check(message);
            for region in &given {
                (self.remove_range)(region.start as *const c_void);
            }
            result
        }
    }

    unsafe fn set_word(&self, _: i32, _: Stream, address: u64, value: i32) -> Result<()> {
        // SAFETY: as promised by the caller; device memory is the process's own here.
        unsafe { (address as *mut i32).write(value) }
        Ok(())
    }

    unsafe fn read(&self, _: i32, _: Stream, address: u64, into: &mut [u8]) -> Result<()> {
        may_fail("cuStreamSynchronize")?;
        // SAFETY: as above; a launch has run when it returns.
        unsafe { (address as *const u8).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
        Ok(())
    }
}
