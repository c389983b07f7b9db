//! What a Python object says of its memory, asked for by the cheapest door that it has:
//! the DLPack table, torch's methods, or NumPy's array interface.

use pyo3::intern;
use pyo3::prelude::*;

use crate::dlpack::Exchange;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::place::Place;
use crate::tensor::Tensor;

/// An array as its owner describes it, before any check.
pub struct Array<'a> {
    pub data: *mut u8,
    pub shape: &'a [i64],
    /// `None` where the elements are said to lie one after the other.
    pub strides: Option<&'a [i64]>,
    /// Bytes that a stride of 1 steps over.
    pub step: i64,
    /// The element type, or the name of one that is not supported.
    pub element: Result<Element, String>,
    pub read_only: bool,
    pub place: Place,
}

/// The checked view of an argument.
pub fn tensor(name: &'static str, object: &Bound<'_, PyAny>) -> Result<Tensor> {
    if let Some(table) = Exchange::of(&object.get_type())? {
        return from_table(name, object, table);
    }
    if let Some(address) = object.getattr_opt(intern!(object.py(), "data_ptr"))? {
        return from_torch(name, object, &address);
    }
    if let Some(interface) = object.getattr_opt(intern!(object.py(), "__array_interface__"))? {
        return from_interface(name, &interface);
    }
    let given = object.get_type().name()?;
    Err(Error::wrong_type(name, given, "a torch.Tensor or NumPy array"))
}

fn from_table(name: &'static str, object: &Bound<'_, PyAny>, table: Exchange) -> Result<Tensor> {
    let Ok(view) = table.view(object) else {
        return Err(not_in_memory(name, object)?);
    };
    let rank = view.ndim as usize;
    let dims = |dims: *mut i64| match rank {
        0 => &[],
        // SAFETY: DLPack gives `ndim` sizes and, since 1.2, always as many strides, alive until control returns to
        // Python.
        _ => unsafe { std::slice::from_raw_parts(dims, rank) },
    };
    let shape = dims(view.shape);
    let pretended = view.data.is_null() && !shape.contains(&0);
    let (Some(place), false) = (Place::of(view.device), pretended) else {
        return Err(not_in_memory(name, object)?);
    };
    let array = Array {
        data: view.data.cast::<u8>().wrapping_add(view.byte_offset as usize),
        shape,
        strides: Some(dims(view.strides)),
        step: i64::from(view.dtype.bits) / 8,
        element: view.dtype.element(),
        read_only: false,
        place,
    };
    Tensor::new(name, array)
}

fn from_torch(name: &'static str, object: &Bound<'_, PyAny>, data_ptr: &Bound<'_, PyAny>) -> Result<Tensor> {
    let Some(place) = Place::named(&object.getattr("device")?.str()?.to_string()) else {
        return Err(not_in_memory(name, object)?);
    };
    let dtype = object.getattr("dtype")?.str()?.to_string();
    let dtype = dtype.trim_start_matches("torch.");
    let array = Array {
        data: data_ptr.call0()?.extract::<usize>()? as *mut u8,
        shape: &object.getattr("shape")?.extract::<Vec<i64>>()?,
        strides: Some(&object.call_method0("stride")?.extract::<Vec<i64>>()?),
        step: object.call_method0("element_size")?.extract::<i64>()?,
        element: Element::from_name(dtype).ok_or_else(|| dtype.to_owned()),
        read_only: false,
        place,
    };
    Tensor::new(name, array)
}

/// NumPy's array interface, version 3.
fn from_interface(name: &'static str, interface: &Bound<'_, PyAny>) -> Result<Tensor> {
    let (address, read_only): (usize, bool) = interface.get_item("data")?.extract()?;
    let typestr: String = interface.get_item("typestr")?.extract()?;
    let strides: Option<Vec<i64>> = interface.get_item("strides")?.extract()?;
    let array = Array {
        data: address as *mut u8,
        shape: &interface.get_item("shape")?.extract::<Vec<i64>>()?,
        strides: strides.as_deref(),
        step: 1,
        element: Element::from_typestr(&typestr).ok_or(typestr),
        read_only,
        place: Place::Cpu,
    };
    Tensor::new(name, array)
}

/// For tensors on devices that have no backend, sparse ones, and those that only pretend (meta, fake and batched
/// tensors).
fn not_in_memory(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Error> {
    let (kind, device) = (object.get_type().name()?, object.getattr("device")?.str()?.to_string());
    let layout = object.getattr("layout")?.str()?.to_string();
    let in_memory = layout == "torch.strided" && (device == "cpu" || device.starts_with("cuda"));
    let given = if in_memory {
        format!("a {kind} on {device} without memory of its own, as inside of vmap and other transforms")
    } else {
        format!("a {layout} {kind} on device {device}")
    };
    Ok(Error::wrong_value(name, given, "a dense tensor in CPU or CUDA memory"))
}
