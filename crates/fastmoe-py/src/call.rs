//! What every native function does around its work.

use fastmoe_core::Update;
use fastmoe_cpu::{DType, Threads};
use pyo3::prelude::*;

use crate::element::Element;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Runs the work with the GIL released, once the instruction set is known to be usable.
pub fn compute<T: Send>(py: Python<'_>, work: impl Send + FnOnce() -> Result<T>) -> Result<T> {
    fastmoe_cpu::isa()?;
    py.detach(work)
}

/// An argument that counts something.
pub fn at_least(name: &str, least: i64, given: i64) -> Result<usize> {
    if given >= least {
        Ok(given as usize)
    } else {
        Err(Error::wrong_value(name, given, format!("at least {least}")))
    }
}

/// The `threads` argument.
pub fn threads(given: i64) -> Result<Threads> {
    at_least("threads", 1, given).map(Threads::new)
}

pub fn optional_input(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> Result<Option<Tensor>> {
    object.map(|object| Tensor::input(name, object)).transpose()
}

pub fn optional_output(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> Result<Option<Tensor>> {
    object.map(|object| Tensor::output(name, object)).transpose()
}

/// An optional tensor that is of this type and shape where it is given.
pub fn checked(
    tensor: Option<Tensor>,
    element: impl Into<Element>,
    shape: &[usize],
    legend: &str,
) -> Result<Option<Tensor>> {
    if let Some(tensor) = &tensor {
        tensor.expect(element, shape, legend)?;
    }
    Ok(tensor)
}

/// How the gradient of weights of this dtype meets its tensor: what is added may be as wide as the sums are.
pub fn update(grad: &Tensor, dtype: DType, adds: bool) -> Result<Update> {
    if adds && grad.element() == Element::of_weights(dtype) {
        return Ok(Update::AddWide);
    }
    grad.expect_element(dtype.into())?;
    Ok(if adds { Update::Add } else { Update::Write })
}

/// An input that other arguments make optional, and which these ones need.
pub fn required_input(name: &'static str, object: Option<&Bound<'_, PyAny>>) -> Result<Tensor> {
    optional_input(name, object)?
        .ok_or_else(|| Error::wrong_type(name, "None", "a torch.Tensor or NumPy array"))
}
