//! NVIDIA's driver, loaded at run time by its C functions.

use crate::driver::{Device, Driver, Kernel, MapSpec, Region, Stream, TensorMap};
use crate::error::{self, Error, Result, Status};
use libloading::Library;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::Mutex;

type Context = *mut c_void;

const MULTIPROCESSOR_COUNT: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const SHARED_PER_BLOCK_OPTIN: c_int = 97;
const MAX_DYNAMIC_SHARED: c_int = 8;

/// Declares the table of functions and how it is filled.
macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*);)*) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($arg),*) -> Status,)*
        }

        impl Functions {
            fn load(library: &Library) -> Result<Self> {
                Ok(Self {
                    $($field: {
                        // SAFETY: the symbol is that function of the driver's documented C interface.
                        let function = unsafe { library.get(concat!($symbol, "\0").as_bytes()) };
                        *function.map_err(|_| Error::MissingSymbol { symbol: $symbol })?
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    driver_version = "cuDriverGetVersion": fn(*mut c_int);
    error_name = "cuGetErrorName": fn(Status, *mut *const c_char);
    error_string = "cuGetErrorString": fn(Status, *mut *const c_char);
    device_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
    primary_context = "cuDevicePrimaryCtxRetain": fn(*mut Context, c_int);
    current_context = "cuCtxGetCurrent": fn(*mut Context);
    set_context = "cuCtxSetCurrent": fn(Context);
    push_context = "cuCtxPushCurrent_v2": fn(Context);
    pop_context = "cuCtxPopCurrent_v2": fn(*mut Context);
    load_module = "cuModuleLoadData": fn(*mut *mut c_void, *const c_void);
    module_function = "cuModuleGetFunction": fn(*mut *mut c_void, *mut c_void, *const c_char);
    function_attribute = "cuFuncSetAttribute": fn(*mut c_void, c_int, c_int);
    load_function = "cuFuncLoad": fn(*mut c_void);
    set_words = "cuMemsetD32Async": fn(u64, c_uint, usize, *mut c_void);
    synchronize = "cuStreamSynchronize": fn(*mut c_void);
    copy_to_host = "cuMemcpyDtoH_v2": fn(*mut c_void, u64, usize);
    launch_kernel = "cuLaunchKernel": fn(
        *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void,
        *mut *mut c_void
    );
    encode_tiled = "cuTensorMapEncodeTiled": fn(
        *mut TensorMap, c_int, c_uint, *mut c_void, *const u64, *const u64, *const u32, *const u32, c_int, c_int, c_int,
        c_int
    );
}

/// The driver of this machine.
pub struct Libcuda {
    call: Functions,
    /// The primary contexts retained so far, by device; torch uses the same ones.
    contexts: Mutex<Vec<(i32, usize)>>,
    _library: Library,
}

impl Libcuda {
    /// Loads and initialises libcuda; `wanted` is the CUDA version of the images, as the driver counts.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::MissingSymbol`], [`Error::DriverTooOld`], [`Error::Driver`].
    pub fn open(wanted: i32) -> Result<Self> {
        // SAFETY: the initialisers of libcuda are made for being loaded at any time.
        let library = unsafe { Library::new("libcuda.so.1") }
            .map_err(|error| Error::NoDriver { reason: error.to_string() })?;
        let call = Functions::load(&library)?;
        let driver = Self { call, contexts: Mutex::default(), _library: library };
        // SAFETY: as the driver's documentation says.
        driver.check("cuInit", unsafe { (driver.call.init)(0) })?;
        let given = driver.version()?;
        if given < wanted {
            return Err(Error::DriverTooOld { given, wanted });
        }
        Ok(driver)
    }

    /// Makes an error of a status.
    fn check(&self, call: &'static str, status: Status) -> Result<()> {
        let text = |of: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut text = ptr::null();
            // SAFETY: the driver gives a static string, or leaves null for a status it does not know.
            unsafe {
                of(status, &mut text);
                if text.is_null() {
                    format!("error {status}")
                } else {
                    CStr::from_ptr(text).to_string_lossy().into_owned()
                }
            }
        };
        error::check(call, status, || (text(self.call.error_name), text(self.call.error_string)))
    }

    fn attribute(&self, attribute: c_int, device: c_int) -> Result<u32> {
        let mut value = 0;
        // SAFETY: the output points to a local.
        self.check("cuDeviceGetAttribute", unsafe {
            (self.call.device_attribute)(&mut value, attribute, device)
        })?;
        Ok(value as u32)
    }

    /// Runs `work` with the primary context of the device current, as it mostly is already.
    ///
    /// A thread without a context is on device 0 for the CUDA runtime. Where that is the device it keeps the context, as
    /// it would after a call of the runtime: torch warns where its own thread of backward passes then has none.
    fn within<T>(&self, device: i32, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let wanted = self.context(device)?;
        let mut current = ptr::null_mut();
        // SAFETY: contexts are the driver's; the push is undone on this thread.
        unsafe {
            self.check("cuCtxGetCurrent", (self.call.current_context)(&mut current))?;
            if current.is_null() && device == 0 {
                self.check("cuCtxSetCurrent", (self.call.set_context)(wanted))?;
                return work();
            }
            if current == wanted {
                return work();
            }
            self.check("cuCtxPushCurrent", (self.call.push_context)(wanted))?;
            let result = work();
            self.check("cuCtxPopCurrent", (self.call.pop_context)(&mut current))?;
            result
        }
    }

    fn context(&self, device: i32) -> Result<Context> {
        let mut contexts = self.contexts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, context)) = contexts.iter().find(|(known, _)| *known == device) {
            return Ok(*context as Context);
        }
        let mut context = ptr::null_mut();
        // SAFETY: the output points to a local. The context is kept for the life of the process.
        self.check("cuDevicePrimaryCtxRetain", unsafe {
            (self.call.primary_context)(&mut context, self.ordinal(device)?)
        })?;
        contexts.push((device, context as usize));
        Ok(context)
    }

    /// Loads an image into the current context, where it stays.
    fn load_image(&self, image: &[u8]) -> Result<*mut c_void> {
        let mut module = ptr::null_mut();
        // SAFETY: the image is a whole cubin or a PTX text that ends in a zero; the driver copies it.
        let status = unsafe { (self.call.load_module)(&mut module, image.as_ptr().cast()) };
        self.check("cuModuleLoadData", status)?;
        Ok(module)
    }

    fn function(&self, module: *mut c_void, name: &str, shared: u32) -> Result<usize> {
        let name = CString::new(name).expect("symbols have no zero bytes");
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded in the current context; the name ends in a zero.
        unsafe {
            let status = (self.call.module_function)(&mut function, module, name.as_ptr());
            self.check("cuModuleGetFunction", status)?;
            let status = (self.call.function_attribute)(function, MAX_DYNAMIC_SHARED, shared as c_int);
            self.check("cuFuncSetAttribute", status)?;
            // Otherwise the first launch loads it, perhaps while a graph is captured.
            self.check("cuFuncLoad", (self.call.load_function)(function))?;
        }
        Ok(function.addr())
    }

    fn ordinal(&self, device: i32) -> Result<c_int> {
        let count = self.device_count()?;
        if !(0..count).contains(&device) {
            return Err(Error::NoDevice { device, count });
        }
        let mut ordinal = 0;
        // SAFETY: the output points to a local.
        self.check("cuDeviceGet", unsafe { (self.call.device_get)(&mut ordinal, device) })?;
        Ok(ordinal)
    }
}

impl Driver for Libcuda {
    fn version(&self) -> Result<i32> {
        let mut version = 0;
        // SAFETY: the output points to a local.
        self.check("cuDriverGetVersion", unsafe { (self.call.driver_version)(&mut version) })?;
        Ok(version)
    }

    fn device_count(&self) -> Result<i32> {
        let mut count = 0;
        // SAFETY: the output points to a local.
        self.check("cuDeviceGetCount", unsafe { (self.call.device_count)(&mut count) })?;
        Ok(count)
    }

    fn device(&self, device: i32) -> Result<Device> {
        let ordinal = self.ordinal(device)?;
        let mut name = [0; 128];
        // SAFETY: the driver writes at most that many bytes, the last a zero.
        let name = unsafe {
            let status = (self.call.device_name)(name.as_mut_ptr(), name.len() as c_int, ordinal);
            self.check("cuDeviceGetName", status)?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        Ok(Device {
            name,
            capability: (
                self.attribute(CAPABILITY_MAJOR, ordinal)?,
                self.attribute(CAPABILITY_MINOR, ordinal)?,
            ),
            multiprocessors: self.attribute(MULTIPROCESSOR_COUNT, ordinal)?,
            shared_per_block: self.attribute(SHARED_PER_BLOCK_OPTIN, ordinal)?,
        })
    }

    fn load(&self, device: i32) -> Result<HashMap<&'static str, Kernel>> {
        let (major, minor) = self.device(device)?.capability;
        let images: Vec<_> = fastmoe_kernels::images_of(major, minor).collect();
        if images.is_empty() {
            let mut built: Vec<_> = fastmoe_kernels::images().iter().map(|image| image.arch.name()).collect();
            built.sort_unstable();
            built.dedup();
            let built = if built.is_empty() { "none at all".to_owned() } else { built.join(", ") };
            return Err(Error::NoImage { major, minor, built });
        }
        self.within(device, || {
            let mut kernels = HashMap::new();
            for image in images {
                let module = self.load_image(&image.inflate())?;
                for kernel in image.kernels {
                    let function = self.function(module, kernel.name, kernel.shared_bytes)?;
                    let (threads, shared) = (kernel.threads, kernel.shared_bytes);
                    kernels.insert(kernel.name, Kernel { function, threads, shared });
                }
            }
            Ok(kernels)
        })
    }

    fn tensor_map(&self, device: i32, spec: &MapSpec) -> Result<TensorMap> {
        // As in cuda.h; a copy does not look at elements, so that all of 16 bits are the same to it.
        const UINT16: c_int = 1;
        const NOT_INTERLEAVED: c_int = 0;
        const SWIZZLE_128B: c_int = 3;
        const PROMOTION: [c_int; 2] = [0, 3]; // none, to 256 bytes
        const ZEROS_OUTSIDE: c_int = 0;
        self.within(device, || {
            let mut map = TensorMap::NONE;
            // SAFETY: the map is aligned to 64 bytes, and each array has the elements of three dimensions, strides those
            // of two; the driver reads the arrays and not the tensor.
            let status = unsafe {
                (self.call.encode_tiled)(
                    &mut map,
                    UINT16,
                    3,
                    spec.address as *mut c_void,
                    spec.sizes.map(|size| size as u64).as_ptr(),
                    spec.strides().as_ptr(),
                    [MapSpec::BOX_WIDTH, spec.box_height, 1].as_ptr(),
                    [1; 3].as_ptr(),
                    NOT_INTERLEAVED,
                    SWIZZLE_128B,
                    PROMOTION[usize::from(spec.two_boxes)],
                    ZEROS_OUTSIDE,
                )
            };
            self.check("cuTensorMapEncodeTiled", status)?;
            Ok(map)
        })
    }

    unsafe fn launch(
        &self,
        device: i32,
        stream: Stream,
        kernel: Kernel,
        blocks: u32,
        params: &[u8],
        _memory: &[Region],
    ) -> Result<()> {
        self.within(device, || {
            let mut params = [params.as_ptr() as *mut c_void];
            // SAFETY: as promised by the caller; the driver copies the parameters before it returns.
            self.check("cuLaunchKernel", unsafe {
                (self.call.launch_kernel)(
                    kernel.function as *mut c_void,
                    blocks,
                    1,
                    1,
                    kernel.threads,
                    1,
                    1,
                    kernel.shared,
                    stream.0 as *mut c_void,
                    params.as_mut_ptr(),
                    ptr::null_mut(),
                )
            })
        })
    }

    unsafe fn set_word(&self, device: i32, stream: Stream, address: u64, value: i32) -> Result<()> {
        self.within(device, || {
            // SAFETY: as promised by the caller.
            let status =
                unsafe { (self.call.set_words)(address, value as c_uint, 1, stream.0 as *mut c_void) };
            self.check("cuMemsetD32Async", status)
        })
    }

    unsafe fn read(&self, device: i32, stream: Stream, address: u64, into: &mut [u8]) -> Result<()> {
        self.within(device, || {
            // SAFETY: as promised by the caller; the copy ends before the call returns.
            unsafe {
                self.check("cuStreamSynchronize", (self.call.synchronize)(stream.0 as *mut c_void))?;
                let status = (self.call.copy_to_host)(into.as_mut_ptr().cast(), address, into.len());
                self.check("cuMemcpyDtoH", status)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine with a driver the devices answer; on one without, the error says what to do.
    #[test]
    fn opens_or_says_why_not() {
        match Libcuda::open(12_000) {
            Ok(driver) => {
                let count = driver.device_count().unwrap();
                for device in 0..count {
                    assert!(driver.device(device).unwrap().capability.0 >= 3);
                }
                assert_eq!(driver.device(count).unwrap_err(), Error::NoDevice { device: count, count });
            }
            Err(error) => assert!(error.to_string().contains("driver"), "{error}"),
        }
    }
}
