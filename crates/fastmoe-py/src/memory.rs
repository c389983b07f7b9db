//! `empty` and `empty_like`: torch tensors in memory of the backend's recycling pool.

use std::ptr::NonNull;

use fastmoe_cpu::memory;
use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyDict, PyTuple, PyType};

use crate::dlpack::{self, DLDevice, DLManagedTensorVersioned, DLPackVersion, DLTensor, Exchange};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The tensor that DLPack hands over, first, with what it points to; the deleter drops it all.
#[repr(C)]
struct Lease {
    tensor: DLManagedTensorVersioned,
    _buffer: memory::Buffer,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

#[pyfunction]
#[pyo3(signature = (shape, dtype, *, unwritten = false))]
pub fn empty<'py>(
    py: Python<'py>,
    shape: Vec<i64>,
    dtype: &str,
    unwritten: bool,
) -> Result<Bound<'py, PyAny>> {
    let element = Element::from_name(dtype).filter(|e| e.float().is_some()).ok_or_else(|| {
        Error::wrong_value("dtype", format!("'{dtype}'"), "'float32', 'float64', 'bfloat16' or 'float16'")
    })?;
    pooled(py, shape, element, unwritten)
}

#[pyfunction]
#[pyo3(signature = (tensor, *, unwritten = false))]
pub fn empty_like<'py>(
    py: Python<'py>,
    tensor: &Bound<'py, PyAny>,
    unwritten: bool,
) -> Result<Bound<'py, PyAny>> {
    let like = Tensor::input("tensor", tensor)?;
    like.float()?;
    pooled(py, like.shape().iter().map(|&n| n as i64).collect(), like.element(), unwritten)
}

fn pooled(py: Python<'_>, shape: Vec<i64>, element: Element, unwritten: bool) -> Result<Bound<'_, PyAny>> {
    // A size of 0 counts as 1, as it does for strides.
    let bytes = shape
        .iter()
        .try_fold(element.bytes(), |bytes, &n| bytes.checked_mul(usize::try_from(n).ok()?.max(1)))
        .filter(|&bytes| bytes <= isize::MAX as usize)
        .ok_or_else(|| {
            Error::wrong_value("shape", format!("{shape:?}"), "sizes of at least 0 that fit in memory")
        })?;
    let bytes = if shape.contains(&0) { 0 } else { bytes };
    match Exchange::of(tensor_type(py)?)? {
        Some(table) => {
            let buffer = if unwritten { memory::alloc_unwritten(bytes) } else { memory::alloc(bytes) }?;
            let lease = lease(shape, element, buffer);
            // SAFETY: the lease owns everything that its tensor points to until `give_back` drops it.
            Ok(unsafe { table.adopt(py, lease) }?)
        }
        None => {
            let torch = py.import("torch")?;
            let dtype = [("dtype", torch.getattr(element.name())?)].into_py_dict(py)?;
            Ok(torch.call_method("empty", (PyTuple::new(py, shape)?,), Some(&dtype))?)
        }
    }
}

/// Give the memory that waits in the CPU backend's pool back to the system.
#[pyfunction]
pub fn empty_cache(py: Python<'_>) {
    py.detach(memory::empty_cache);
}

/// The counters of the CPU backend's pool: `cached_bytes` that wait, `used_bytes`, and the requests that were served from
/// it (`hits`) or not (`misses`).
#[pyfunction]
pub fn memory_stats(py: Python<'_>) -> Result<Bound<'_, PyDict>> {
    let stats = memory::stats();
    let counters = [
        ("cached_bytes", stats.cached_bytes),
        ("used_bytes", stats.used_bytes),
        ("hits", stats.hits),
        ("misses", stats.misses),
    ];
    Ok(counters.into_py_dict(py)?)
}

/// `torch.Tensor`.
pub fn tensor_type(py: Python<'_>) -> Result<&Bound<'_, PyType>> {
    static TENSOR: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    TENSOR.import(py, "torch", "Tensor").map_err(|error| {
        if error.is_instance_of::<PyImportError>(py) {
            let needed = PyImportError::new_err("fastmoe_rs needs PyTorch for tensors: pip install torch");
            needed.set_cause(py, Some(error));
            return Error::Python(needed);
        }
        Error::Python(error)
    })
}

fn lease(shape: Vec<i64>, element: Element, buffer: memory::Buffer) -> NonNull<DLManagedTensorVersioned> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1);
    }
    let mut lease = Box::new(Lease {
        tensor: DLManagedTensorVersioned {
            version: DLPackVersion { major: 1, minor: 0 },
            manager_ctx: std::ptr::null_mut(),
            deleter: Some(give_back),
            flags: 0,
            dl_tensor: DLTensor {
                data: buffer.as_mut_ptr().cast(),
                device: DLDevice { kind: dlpack::CPU, index: 0 },
                ndim: shape.len() as i32,
                dtype: element.into(),
                shape: std::ptr::null_mut(),
                strides: std::ptr::null_mut(),
                byte_offset: 0,
            },
        },
        _buffer: buffer,
        shape,
        strides,
    });
    lease.tensor.dl_tensor.shape = lease.shape.as_mut_ptr();
    lease.tensor.dl_tensor.strides = lease.strides.as_mut_ptr();
    NonNull::from(Box::leak(lease)).cast()
}

/// Called by torch when the last tensor over the memory goes.
unsafe extern "C" fn give_back(tensor: *mut DLManagedTensorVersioned) {
    // SAFETY: `lease` leaked this box, whose first field is the tensor, and DLPack calls a deleter once.
    drop(unsafe { Box::from_raw(tensor.cast::<Lease>()) });
}
