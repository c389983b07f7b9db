//! The one place where Rust errors become Python exceptions.

use pyo3::PyErr;
use pyo3::exceptions::{PyTypeError, PyValueError};

/// What went wrong with a call; its text names the argument, what was given and what was wanted.
pub enum Error {
    /// `TypeError`: the wrong kind of object or element.
    Type(String),
    /// `ValueError`: the right kind with a wrong value, shape or place in memory.
    Value(String),
    /// An exception raised by Python itself.
    Python(PyErr),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
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
            Error::Python(error) => error,
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

impl From<fastmoe_cpu::IsaError> for Error {
    fn from(error: fastmoe_cpu::IsaError) -> Self {
        Self::Value(error.to_string())
    }
}
