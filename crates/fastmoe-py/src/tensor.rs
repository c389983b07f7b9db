//! A checked view of one tensor argument.

use std::fmt::Display;
use std::ops::Range;

use fastmoe_cpu::{DType, Ptr, PtrMut};
use pyo3::intern;
use pyo3::prelude::*;
use smallvec::SmallVec;

use crate::array::{self, Array};
use crate::element::{Element, Scalar};
use crate::error::{Error, Result};
use crate::place::Place;

/// An argument, C-contiguous and aligned, of a supported element type.
///
/// It borrows from the Python object that the caller of the native function holds for the length of the call.
#[derive(Clone)]
pub struct Tensor {
    name: &'static str,
    data: *mut u8,
    bytes: usize,
    shape: SmallVec<[usize; 4]>,
    element: Element,
    place: Place,
    read_only: bool,
}

// SAFETY: a view is an address with its extent; nothing in it belongs to a thread.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Tensor {
    /// A tensor to read.
    pub fn input(name: &'static str, object: &Bound<'_, PyAny>) -> Result<Self> {
        array::tensor(name, object)
    }

    /// A tensor to write: not read-only, and not watched by autograd, which would miss the change.
    pub fn output(name: &'static str, object: &Bound<'_, PyAny>) -> Result<Self> {
        let tensor = array::tensor(name, object)?;
        if tensor.read_only {
            return Err(Error::wrong_value(name, "a read-only array", "a writable one to put the result in"));
        }
        if let Some(watched) = object.getattr_opt(intern!(object.py(), "requires_grad"))?
            && watched.is_truthy()?
        {
            let given = "a tensor that requires grad";
            return Err(Error::wrong_value(name, given, "one to put the result in"));
        }
        Ok(tensor)
    }

    /// The view of an array that can be used as it is.
    pub fn new(name: &'static str, array: Array<'_>) -> Result<Self> {
        let Array { data, shape, strides, step, element, read_only, place } = array;
        let element = element.map_err(|given| {
            let wanted = "one that kernels have: float32, float64, bfloat16, float16, int32 or int64";
            Error::wrong_type(name, format!("dtype {given}"), wanted)
        })?;
        // A stride that bytes cannot count belongs to an axis along which nobody steps.
        let mut bytes = element.bytes() as i64;
        let mut dense = true;
        for axis in (0..shape.len()).rev() {
            let stride =
                strides.map_or(bytes, |strides| strides.get(axis).map_or(0, |n| n.wrapping_mul(step)));
            dense &= stride == bytes || shape[axis] == 1;
            bytes = bytes.wrapping_mul(shape[axis]);
        }
        if !dense && !shape.contains(&0) {
            let strides: Vec<_> = strides.unwrap_or_default().iter().map(|n| n.wrapping_mul(step)).collect();
            let given = format!("strides {} bytes for shape {}", tuple(&strides), tuple(shape));
            return Err(Error::wrong_value(name, given, "a C-contiguous tensor; call .contiguous()"));
        }
        if !data.addr().is_multiple_of(element.bytes()) {
            return Err(Error::wrong_value(name, "a misaligned array", "memory aligned to its elements"));
        }
        let shape = shape.iter().map(|&n| n as usize).collect();
        Ok(Self { name, data, bytes: bytes as usize, shape, element, place, read_only })
    }

    /// Dense int32 memory.
    ///
    /// # Safety
    /// The caller keeps `length` aligned numbers there for as long as the tensor is used.
    pub unsafe fn int32(name: &'static str, start: usize, length: usize, place: Place) -> Self {
        let (data, bytes, shape) = (start as *mut u8, 4 * length, SmallVec::from_slice(&[length]));
        Self { name, data, bytes, shape, element: Element::I32, place, read_only: false }
    }

    /// The tensor of this shape, and the int32 numbers behind it, that one of a single axis with [`room`] for these holds.
    pub fn with_numbers(&self, shape: &[usize], count: usize, legend: &str) -> Result<[Self; 2]> {
        let elements = shape.iter().fold(1, |product: usize, &size| product.saturating_mul(size));
        self.expect_shape(&[elements.saturating_add(room(count))], legend)?;
        let first = Self { bytes: elements * self.element.bytes(), shape: shape.into(), ..*self };
        let start = first.addresses().end.next_multiple_of(4);
        // SAFETY: the room behind the first holds this many numbers from there on.
        Ok([first, unsafe { Self::int32(self.name, start, count, self.place) }])
    }

    /// A tensor of one axis as several that follow each other in its memory; fails unless they fill it.
    pub fn split<const N: usize>(&self, parts: [(&'static str, &[usize]); N]) -> Result<[Self; N]> {
        let sizes = parts.map(|(_, shape)| shape.iter().product::<usize>());
        let all = [sizes.iter().sum()];
        if self.shape() != all {
            self.expect_shape(&all, &parts.map(|(name, _)| name).join(" + "))?;
        }
        let mut data = self.data;
        Ok(std::array::from_fn(|part| {
            let ((name, shape), bytes) = (parts[part], sizes[part] * self.element.bytes());
            let tensor = Self { name, data, bytes, shape: shape.into(), ..*self };
            data = data.wrapping_add(bytes);
            tensor
        }))
    }

    /// The same memory said to have another shape, for the words of an error.
    pub fn with_shape(self, shape: SmallVec<[usize; 4]>) -> Self {
        Self { shape, ..self }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The sizes of a tensor of N axes, which `legend` names; only tokens T and rows R may be none.
    pub fn dims<const N: usize>(&self, legend: &str) -> Result<[usize; N]> {
        let sizes: [usize; N] = self
            .shape
            .as_slice()
            .try_into()
            .map_err(|_| Error::wrong_value(self.name, self.given_shape(), format!("[{legend}]")))?;
        if !sizes.contains(&0) {
            return Ok(sizes);
        }
        let mut axes = legend.split(", ").zip(sizes);
        match axes.find(|&(axis, size)| size == 0 && axis != "T" && axis != "R") {
            None => Ok(sizes),
            Some((axis, _)) => {
                let wanted = format!("[{legend}] with {axis} >= 1");
                Err(Error::wrong_value(self.name, self.given_shape(), wanted))
            }
        }
    }

    /// Fails unless the shape is this one.
    pub fn expect_shape(&self, shape: &[usize], legend: &str) -> Result<()> {
        if self.shape() == shape {
            return Ok(());
        }
        let wanted = format!("[{legend}] = {}", tuple(shape));
        Err(Error::wrong_value(self.name, self.given_shape(), wanted))
    }

    /// Fails unless the element type is this one.
    pub fn expect_element(&self, element: Element) -> Result<()> {
        if self.element == element {
            return Ok(());
        }
        Err(wrong_dtype(self.name, self.element, element.name()))
    }

    /// Fails unless element type and shape are these.
    pub fn expect(&self, element: impl Into<Element>, shape: &[usize], legend: &str) -> Result<()> {
        self.expect_element(element.into())?;
        self.expect_shape(shape, legend)
    }

    /// The floating-point type of the elements.
    pub fn float(&self) -> Result<DType> {
        self.element
            .float()
            .ok_or_else(|| wrong_dtype(self.name, self.element, "float32, float64, bfloat16 or float16"))
    }

    pub fn element(&self) -> Element {
        self.element
    }

    pub fn place(&self) -> Place {
        self.place
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn ptr(&self) -> Ptr {
        self.data
    }

    pub fn ptr_mut(&self) -> PtrMut {
        self.data
    }

    /// The elements; fails unless they are `T`.
    pub fn slice<T: Scalar>(&self) -> Result<&[T]> {
        self.expect_element(T::ELEMENT)?;
        let data = if self.count() == 0 { std::ptr::dangling() } else { self.data.cast::<T>().cast_const() };
        // SAFETY: `check` saw that many aligned, dense elements of this type, which the caller keeps alive;
        // outputs are told apart from inputs by `disjoint` before any is written.
        Ok(unsafe { std::slice::from_raw_parts(data, self.count()) })
    }

    /// The elements to write; fails unless they are `T`.
    pub fn slice_mut<T: Scalar>(&mut self) -> Result<&mut [T]> {
        self.expect_element(T::ELEMENT)?;
        let data = if self.count() == 0 { std::ptr::dangling_mut() } else { self.data.cast::<T>() };
        // SAFETY: as for `slice`; `disjoint` has seen that no other argument shares this memory.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, self.count()) })
    }

    fn given_shape(&self) -> String {
        format!("shape {}", tuple(self.shape()))
    }

    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    fn addresses(&self) -> Range<usize> {
        self.data.addr()..self.data.addr() + self.bytes
    }
}

/// Elements of any size, 2 bytes at least, that hold so many int32 numbers from a multiple of 4 bytes on.
pub fn room(numbers: usize) -> usize {
    2 * numbers + 1
}

/// The `TypeError` for an element type that another one was wanted for.
pub fn wrong_dtype(name: &str, given: Element, wanted: &str) -> Error {
    Error::wrong_type(name, format!("dtype {}", given.name()), wanted)
}

/// Sizes as Python writes them.
fn tuple(sizes: &[impl Display]) -> String {
    let sizes: Vec<_> = sizes.iter().map(ToString::to_string).collect();
    let comma = if sizes.len() == 1 { "," } else { "" };
    format!("({}{comma})", sizes.join(", "))
}

/// The place where all arguments are; fails when they are on several devices.
pub fn common_place(tensors: &[&Tensor]) -> Result<Place> {
    let first = tensors.first().expect("every function has a tensor");
    match tensors.iter().find(|tensor| tensor.place != first.place) {
        None => Ok(first.place),
        Some(other) => {
            let given = format!("a tensor on {}", other.place);
            let wanted = format!("one on {}, where {} is", first.place, first.name);
            Err(Error::wrong_value(other.name, given, wanted))
        }
    }
}

/// Fails when an output, all tensors but the first `inputs`, shares memory with an input or with another output.
pub fn disjoint(tensors: &[&Tensor], inputs: usize) -> Result<()> {
    for (index, output) in tensors.iter().enumerate().skip(inputs) {
        let range = output.addresses();
        let shares = |other: &&&Tensor| {
            let taken = other.addresses();
            range.start.max(taken.start) < range.end.min(taken.end)
        };
        if let Some(other) = tensors[..index].iter().find(shares) {
            let given = format!("memory shared with {}", other.name);
            return Err(Error::wrong_value(output.name, given, "memory of its own"));
        }
    }
    Ok(())
}
