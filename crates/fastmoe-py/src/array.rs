//! What a Python object says of its memory, asked for by the cheapest door that it has:
//! the DLPack table, torch's methods, or NumPy's array interface.

use pyo3::intern;
use pyo3::prelude::*;
use smallvec::SmallVec;

use crate::dlpack::Exchange;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::place::Place;

pub type Dims = SmallVec<[i64; 4]>;

/// An array as its owner describes it, before any check.
pub struct Array {
    pub data: *mut u8,
    pub shape: Dims,
    /// In bytes.
    pub strides: Dims,
    /// The element type, or the name of one that is not supported.
    pub element: Result<Element, String>,
    pub read_only: bool,
    pub place: Place,
}

impl Array {
    pub fn describe(name: &str, object: &Bound<'_, PyAny>) -> Result<Self> {
        if let Some(table) = Exchange::of(&object.get_type())? {
            return Self::from_table(name, object, table);
        }
        if let Some(address) = object.getattr_opt(intern!(object.py(), "data_ptr"))? {
            return Self::from_torch(name, object, &address);
        }
        if let Some(interface) = object.getattr_opt(intern!(object.py(), "__array_interface__"))? {
            return Self::from_interface(&interface);
        }
        let given = object.get_type().name()?;
        Err(Error::wrong_type(name, given, "a torch.Tensor or NumPy array"))
    }

    fn from_table(name: &str, object: &Bound<'_, PyAny>, table: Exchange) -> Result<Self> {
        let Ok(view) = table.view(object) else {
            return Err(not_in_memory(name, object)?);
        };
        let rank = view.ndim as usize;
        let dims = |dims: *mut i64| match rank {
            0 => Dims::new(),
            // SAFETY: DLPack gives `ndim` sizes and, since 1.2, always as many strides, alive until control returns to
            // Python.
            _ => Dims::from_slice(unsafe { std::slice::from_raw_parts(dims, rank) }),
        };
        let Some(place) = Place::of(view.device) else { return Err(not_in_memory(name, object)?) };
        let array = Self {
            data: view.data.cast::<u8>().wrapping_add(view.byte_offset as usize),
            shape: dims(view.shape),
            strides: in_bytes(dims(view.strides), i64::from(view.dtype.bits) / 8),
            element: view.dtype.element(),
            read_only: false,
            place,
        };
        let pretended = view.data.is_null() && !array.shape.contains(&0);
        if pretended { Err(not_in_memory(name, object)?) } else { Ok(array) }
    }

    fn from_torch(name: &str, object: &Bound<'_, PyAny>, data_ptr: &Bound<'_, PyAny>) -> Result<Self> {
        let Some(place) = Place::named(&object.getattr("device")?.str()?.to_string()) else {
            return Err(not_in_memory(name, object)?);
        };
        let dtype = object.getattr("dtype")?.str()?.to_string();
        let dtype = dtype.trim_start_matches("torch.");
        let bytes = object.call_method0("element_size")?.extract::<i64>()?;
        Ok(Self {
            data: data_ptr.call0()?.extract::<usize>()? as *mut u8,
            shape: object.getattr("shape")?.extract::<Vec<i64>>()?.into(),
            strides: in_bytes(object.call_method0("stride")?.extract::<Vec<i64>>()?.into(), bytes),
            element: Element::from_name(dtype).ok_or_else(|| dtype.to_owned()),
            read_only: false,
            place,
        })
    }

    /// NumPy's array interface, version 3.
    fn from_interface(interface: &Bound<'_, PyAny>) -> Result<Self> {
        let (address, read_only): (usize, bool) = interface.get_item("data")?.extract()?;
        let typestr: String = interface.get_item("typestr")?.extract()?;
        let element = Element::from_typestr(&typestr).ok_or(typestr);
        let shape: Dims = interface.get_item("shape")?.extract::<Vec<i64>>()?.into();
        let strides = match interface.get_item("strides")?.extract::<Option<Vec<i64>>>()? {
            Some(strides) => strides.into(),
            None => dense_strides(&shape, element.as_ref().map_or(1, |e| e.bytes() as i64)),
        };
        Ok(Self { data: address as *mut u8, shape, strides, element, read_only, place: Place::Cpu })
    }

    /// Whether the elements lie one after the other in row-major order.
    pub fn contiguous(&self) -> bool {
        let Ok(element) = &self.element else { return false };
        let mut dense = element.bytes() as i64;
        let mut axes = self.shape.iter().zip(&self.strides).rev();
        let fits = axes.all(|(&n, &stride)| {
            let fits = n == 1 || stride == dense;
            dense = dense.wrapping_mul(n);
            fits
        });
        fits || self.shape.contains(&0)
    }
}

/// Strides that bytes cannot count belong to axes along which nobody steps.
fn in_bytes(mut strides: Dims, bytes: i64) -> Dims {
    strides.iter_mut().for_each(|stride| *stride = stride.wrapping_mul(bytes));
    strides
}

fn dense_strides(shape: &[i64], bytes: i64) -> Dims {
    let mut strides = Dims::from_elem(bytes, shape.len());
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].wrapping_mul(shape[axis]);
    }
    strides
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
