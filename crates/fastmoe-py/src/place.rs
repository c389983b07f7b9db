//! Where tensors are, and what a CUDA call needs of the library that owns them: a stream and scratch memory.

use std::fmt;

use fastmoe_cuda::driver::Stream;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyString};

use crate::dlpack::{Allocation, CPU, CUDA, DLDevice, Exchange};
use crate::error::{Error, Result};
use crate::memory::tensor_type;

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cpu,
    /// The ordinal of a CUDA device.
    Cuda(i32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl Place {
    /// The place of a DLPack device, if it is one where work can be done.
    pub fn of(device: DLDevice) -> Option<Self> {
        match device.kind {
            CPU => Some(Self::Cpu),
            CUDA => Some(Self::Cuda(device.index)),
            _ => None,
        }
    }

    /// The place that torch calls by this name.
    pub fn named(name: &str) -> Option<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Some(Self::Cpu),
            Some(("cuda", index)) => index.parse().ok().map(Self::Cuda),
            _ => None,
        }
    }

    fn device(self) -> DLDevice {
        match self {
            Self::Cpu => DLDevice { kind: CPU, index: 0 },
            Self::Cuda(index) => DLDevice { kind: CUDA, index },
        }
    }

    /// torch's current stream.
    pub fn stream(self, py: Python<'_>) -> Result<Stream> {
        let Self::Cuda(index) = self else { return Ok(Stream(0)) };
        match Exchange::of(tensor_type(py)?)? {
            Some(table) => {
                table.stream(self.device()).map(|stream| Stream(stream.addr())).map_err(Error::Runtime)
            }
            None => {
                let stream = py.import("torch.cuda")?.call_method1("current_stream", (index,))?;
                Ok(Stream(stream.getattr(intern!(py, "cuda_stream"))?.extract()?))
            }
        }
    }

    /// Memory of torch's allocator for the length of a call. What runs on the current stream may go on using it after
    /// it is dropped: the allocator gives it out again on that stream only.
    pub fn scratch(self, py: Python<'_>, bytes: usize) -> Result<Scratch> {
        if bytes == 0 {
            return Ok(Scratch::Empty);
        }
        if let Some(table) = Exchange::of(tensor_type(py)?)?
            && let Some(allocation) = table.allocate(self.device(), bytes)
        {
            return Ok(Scratch::Table(allocation));
        }
        // Also where the table has failed: this raises what users of torch catch, such as torch.OutOfMemoryError.
        let torch = py.import("torch")?;
        let options =
            [("dtype", torch.getattr("uint8")?), ("device", PyString::new(py, &self.to_string()).into_any())];
        let tensor = torch.call_method("empty", (bytes,), Some(&options.into_py_dict(py)?))?;
        let start = tensor.call_method0("data_ptr")?.extract()?;
        Ok(Scratch::Tensor { start, _owner: tensor.unbind() })
    }
}

/// Scratch memory.
pub enum Scratch {
    Empty,
    Table(Allocation),
    Tensor { start: usize, _owner: Py<PyAny> },
}

impl Scratch {
    pub fn start(&self) -> usize {
        match self {
            Self::Empty => 0,
            Self::Table(allocation) => allocation.start().addr(),
            Self::Tensor { start, .. } => *start,
        }
    }
}
