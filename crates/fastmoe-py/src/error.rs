//! The one place where Rust errors become Python exceptions.

use std::fmt::Display;

use pyo3::exceptions::{PyMemoryError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyType;

/// What went wrong with a call; its text names the argument, what was given and what was wanted.
pub enum Error {
    /// `TypeError`: the wrong kind of object or element.
    Type(String),
    /// `ValueError`: the right kind with a wrong value, shape or place in memory.
    Value(String),
    /// `RuntimeError`: a device or its driver cannot do the work.
    Runtime(String),
    /// `torch.OutOfMemoryError` of a device, or `MemoryError` without torch's.
    OutOfMemory(String),
    /// An exception raised by Python itself.
    Python(PyErr),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A `ValueError` in the words that every message has.
    pub fn wrong_value(name: &str, given: impl Display, wanted: impl Display) -> Self {
        Self::Value(format!("{name}: got {given}, wanted {wanted}"))
    }

    /// A `TypeError` in the same words.
    pub fn wrong_type(name: &str, given: impl Display, wanted: impl Display) -> Self {
        Self::Type(format!("{name}: got {given}, wanted {wanted}"))
    }

    /// Adds a remedy where it applies.
    pub fn hint(self, applies: bool, remedy: &str) -> Self {
        match self {
            Self::Value(text) if applies => Self::Value(format!("{text}; {remedy}")),
            other => other,
        }
    }
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Type(text) => PyTypeError::new_err(text),
            Error::Value(text) => PyValueError::new_err(text),
            Error::Runtime(text) => PyRuntimeError::new_err(text),
            Error::OutOfMemory(text) => out_of_memory(text),
            Error::Python(error) => error,
        }
    }
}

/// What torch itself raises, so that those who catch it catch ours.
fn out_of_memory(text: String) -> PyErr {
    Python::attach(|py| {
        let torchs = py.import("torch").and_then(|torch| torch.getattr("OutOfMemoryError"));
        match torchs.and_then(|error| Ok(error.cast_into::<PyType>()?)) {
            Ok(error) => PyErr::from_type(error, text),
            Err(_) => PyMemoryError::new_err(text),
        }
    })
}

impl From<fastmoe_cuda::Error> for Error {
    fn from(error: fastmoe_cuda::Error) -> Self {
        match error {
            fastmoe_cuda::Error::TooLarge { .. } => Self::Value(error.to_string()),
            fastmoe_cuda::Error::OutOfMemory { .. } => Self::OutOfMemory(error.to_string()),
            _ => Self::Runtime(error.to_string()),
        }
    }
}

impl From<PyErr> for Error {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<fastmoe_core::Error> for Error {
    fn from(error: fastmoe_core::Error) -> Self {
        Self::Value(error.to_string())
    }
}

impl From<fastmoe_cpu::Error> for Error {
    fn from(error: fastmoe_cpu::Error) -> Self {
        match error {
            fastmoe_cpu::Error::OutOfMemory { .. } => Self::Python(PyMemoryError::new_err(error.to_string())),
            _ => Self::Value(error.to_string()),
        }
    }
}
