//! The DLPack C exchange table (DLPack 1.3, `DLPackExchangeAPI`): a tensor's pointer, shape and strides
//! without a reference count, and our memory handed over as a tensor of the other library.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::{PoisonError, RwLock};

use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};
use pyo3::{ffi, intern};

use crate::element::Element;

/// `kDLCPU`.
pub const CPU: i32 = 1;
/// `kDLCUDA`.
pub const CUDA: i32 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DLDevice {
    pub kind: i32,
    pub index: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DLDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

#[repr(C)]
pub struct DLTensor {
    pub data: *mut c_void,
    pub device: DLDevice,
    pub ndim: i32,
    pub dtype: DLDataType,
    pub shape: *mut i64,
    pub strides: *mut i64,
    pub byte_offset: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct DLPackVersion {
    pub major: u32,
    pub minor: u32,
}

#[repr(C)]
pub struct DLManagedTensorVersioned {
    pub version: DLPackVersion,
    pub manager_ctx: *mut c_void,
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    pub flags: u64,
    pub dl_tensor: DLTensor,
}

/// What the table of every version begins with.
#[repr(C)]
struct ExchangeHeader {
    version: DLPackVersion,
    prev_api: *const ExchangeHeader,
}

/// The table of version 1, whose functions are there but for the one that is an `Option`. Those that we do not call are
/// kept as plain addresses.
#[repr(C)]
struct ExchangeApi {
    _header: ExchangeHeader,
    managed_tensor_allocator: unsafe extern "C" fn(
        *mut DLTensor,
        *mut *mut DLManagedTensorVersioned,
        *mut c_void,
        unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char),
    ) -> c_int,
    managed_tensor_from_py_object: *const c_void,
    managed_tensor_to_py_object:
        unsafe extern "C" fn(*mut DLManagedTensorVersioned, *mut *mut c_void) -> c_int,
    dltensor_from_py_object: Option<unsafe extern "C" fn(*mut c_void, *mut DLTensor) -> c_int>,
    current_work_stream: unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int,
}

/// The exchange table of one Python type.
#[derive(Clone, Copy)]
pub struct Exchange(&'static ExchangeApi);

// SAFETY: the table is immutable, and its functions only ask for the GIL, which their callers here hold.
unsafe impl Send for Exchange {}
// SAFETY: as above.
unsafe impl Sync for Exchange {}

/// Tables by the address of their type. The types are kept alive, so that an address means one type for ever.
static TABLES: RwLock<Vec<(usize, Option<Exchange>)>> = RwLock::new(Vec::new());
/// A program has a handful of types of tensors. One that makes types without end does not have them kept.
const KEPT_TYPES: usize = 32;

impl Exchange {
    /// The table of a type, remembered where it is one of the first; `None` where it has none that we understand.
    pub fn of(ty: &Bound<'_, PyType>) -> PyResult<Option<Self>> {
        let address = ty.as_ptr() as usize;
        let known = TABLES.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(_, table)) = known.iter().find(|(known, _)| *known == address) {
            return Ok(table);
        }
        drop(known);
        let table = Self::look_up(ty)?;
        let mut tables = TABLES.write().unwrap_or_else(PoisonError::into_inner);
        if tables.len() < KEPT_TYPES {
            ty.clone().unbind().into_ptr();
            tables.push((address, table));
            // The library behind a new type of tensor may have brought the threads that we share.
            fastmoe_cpu::find_openmp();
        }
        Ok(table)
    }

    fn look_up(ty: &Bound<'_, PyType>) -> PyResult<Option<Self>> {
        let Some(capsule) = ty.getattr_opt(intern!(ty.py(), "__dlpack_c_exchange_api__"))? else {
            return Ok(None);
        };
        let table = capsule.cast::<PyCapsule>()?.pointer_checked(Some(c"dlpack_exchange_api"))?;
        let mut table = table.cast::<ExchangeHeader>().as_ptr().cast_const();
        loop {
            // SAFETY: the protocol keeps the tables of a chain alive and unchanged for the life of the process, and each
            // begins with a header; the last one's `prev_api` is null.
            let Some(header) = (unsafe { table.as_ref() }) else { return Ok(None) };
            match header.version.major {
                1 => {
                    // SAFETY: as above, and this is the table of version 1.
                    let api = unsafe { &*table.cast::<ExchangeApi>() };
                    return Ok(api.dltensor_from_py_object.map(|_| Self(api)));
                }
                0 => return Ok(None),
                _ => table = header.prev_api,
            }
        }
    }

    /// A look at a tensor of this table's type; what it points to lives as long as the tensor.
    pub fn view(self, tensor: &Bound<'_, PyAny>) -> PyResult<DLTensor> {
        let view = self.0.dltensor_from_py_object.expect("look_up keeps only tables that have it");
        let mut out = DLTensor {
            data: ptr::null_mut(),
            device: DLDevice { kind: 0, index: 0 },
            ndim: 0,
            dtype: DLDataType { code: 0, bits: 0, lanes: 0 },
            shape: ptr::null_mut(),
            strides: ptr::null_mut(),
            byte_offset: 0,
        };
        // SAFETY: the object is of the table's type, `out` is a DLTensor, and the GIL is held.
        if unsafe { view(tensor.as_ptr().cast(), &mut out) } != 0 {
            return Err(PyErr::fetch(tensor.py()));
        }
        Ok(out)
    }

    /// The stream on which the tensor library works on a device now.
    pub fn stream(self, device: DLDevice) -> Result<*mut c_void, String> {
        let mut stream = ptr::null_mut();
        // SAFETY: the function takes any device, and the output points to a local.
        match unsafe { (self.0.current_work_stream)(device.kind, device.index, &mut stream) } {
            0 => Ok(stream),
            _ => Err(format!("no current stream on device {}", device.index)),
        }
    }

    /// Uninitialised memory from the tensor library's own allocator, given back when the value is dropped; `None`
    /// where it has none.
    pub fn allocate(self, device: DLDevice, bytes: usize) -> Option<Allocation> {
        unsafe extern "C" fn ignore(_context: *mut c_void, _kind: *const c_char, _message: *const c_char) {}
        let (mut shape, mut stride) = (bytes as i64, 1);
        let mut prototype = DLTensor {
            data: ptr::null_mut(),
            device,
            ndim: 1,
            dtype: DLDataType { code: 1, bits: 8, lanes: 1 },
            shape: &mut shape,
            strides: &mut stride,
            byte_offset: 0,
        };
        let mut out = ptr::null_mut();
        // SAFETY: the prototype, its shape and strides, and the output are locals that outlive the call; `ignore` has the
        // signature of an error handler.
        let status =
            unsafe { (self.0.managed_tensor_allocator)(&mut prototype, &mut out, ptr::null_mut(), ignore) };
        NonNull::new(out).filter(|_| status == 0).map(Allocation)
    }

    /// A tensor of this table's type that owns `tensor` and calls its deleter when it goes.
    ///
    /// # Safety
    /// The fields of `tensor` describe memory that lives until the deleter is called, once, on any thread.
    pub unsafe fn adopt<'py>(
        self,
        py: Python<'py>,
        tensor: NonNull<DLManagedTensorVersioned>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut object = ptr::null_mut();
        // SAFETY: the caller vouches for `tensor`; the callee takes it over; the GIL is held.
        if unsafe { (self.0.managed_tensor_to_py_object)(tensor.as_ptr(), &mut object) } != 0 {
            return Err(PyErr::fetch(py));
        }
        // SAFETY: the protocol returns a new reference, and pyo3 looks for null.
        unsafe { Bound::from_owned_ptr_or_err(py, object.cast::<ffi::PyObject>()) }
    }
}

/// Memory of the tensor library.
pub struct Allocation(NonNull<DLManagedTensorVersioned>);

// SAFETY: DLPack lets a tensor be used and deleted on any thread.
unsafe impl Send for Allocation {}
// SAFETY: as above; nothing is changed through a shared reference.
unsafe impl Sync for Allocation {}

impl Allocation {
    pub fn start(&self) -> *mut u8 {
        // SAFETY: the tensor is ours until the deleter is called.
        let tensor = unsafe { &self.0.as_ref().dl_tensor };
        tensor.data.cast::<u8>().wrapping_add(tensor.byte_offset as usize)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: DLPack's deleter, where there is one, is called once by the owner.
        unsafe {
            if let Some(deleter) = self.0.as_ref().deleter {
                deleter(self.0.as_ptr());
            }
        }
    }
}

impl DLDataType {
    /// The element type, or the name of one that is not supported.
    pub fn element(self) -> Result<Element, String> {
        match (self.code, self.bits, self.lanes) {
            (0, 32, 1) => Ok(Element::I32),
            (0, 64, 1) => Ok(Element::I64),
            (1, 8, 1) => Ok(Element::U8),
            (2, 16, 1) => Ok(Element::F16),
            (2, 32, 1) => Ok(Element::F32),
            (2, 64, 1) => Ok(Element::F64),
            (4, 16, 1) => Ok(Element::Bf16),
            (6, ..) => Err("bool".to_owned()),
            (code, bits, _) => {
                let kinds = ["int", "uint", "float", "opaque", "bfloat", "complex"];
                Err(format!("{}{bits}", kinds.get(usize::from(code)).unwrap_or(&"float")))
            }
        }
    }
}

impl From<Element> for DLDataType {
    fn from(element: Element) -> Self {
        let code = match element {
            Element::I32 | Element::I64 => 0,
            Element::U8 => 1,
            Element::F32 | Element::F64 | Element::F16 => 2,
            Element::Bf16 => 4,
        };
        Self { code, bits: 8 * element.bytes() as u8, lanes: 1 }
    }
}
