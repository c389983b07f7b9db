//! Which backend works on the arguments of a call.

use fastmoe_cuda::{Buffer, DType as CudaType, Gpu, Queue};
use pyo3::prelude::*;

use crate::element::Element;
use crate::error::{Error, Result};
use crate::place::Place;
use crate::tensor::{Tensor, common_place};

/// A backend, with what it needs to begin.
pub enum Backend {
    Cpu,
    Cuda(Device),
}

/// A device and the place of the tensors that it works on.
#[derive(Clone, Copy)]
pub struct Device {
    pub gpu: &'static Gpu,
    place: Place,
}

impl Backend {
    /// The backend of the place where all arguments are.
    pub fn of<'a>(tensors: impl IntoIterator<Item = Option<&'a Tensor>>) -> Result<Self> {
        let place = common_place(tensors)?;
        Ok(match place {
            Place::Cpu => match fastmoe_cuda::emulated()? {
                None => Self::Cpu,
                Some(gpu) => Self::Cuda(Device { gpu, place }),
            },
            Place::Cuda(index) => Self::Cuda(Device { gpu: Gpu::get(index)?, place }),
        })
    }
}

/// Fails unless the CPU backend has to do the work: of what `function` computes, the GPU kernels cannot be launched yet.
pub fn cpu_only<'a>(function: &str, tensors: impl IntoIterator<Item = Option<&'a Tensor>>) -> Result<()> {
    match Backend::of(tensors)? {
        Backend::Cpu => Ok(()),
        Backend::Cuda(_) => {
            Err(Error::Runtime(format!("{function}: not on a GPU yet; move the tensors to the CPU")))
        }
    }
}

impl Device {
    /// Queues the work on torch's current stream, the GIL released, with so many bytes of scratch memory.
    pub fn run(
        self,
        py: Python<'_>,
        scratch: usize,
        work: impl Send + FnOnce(&mut Queue<'_>) -> fastmoe_cuda::Result<()>,
    ) -> Result<()> {
        let memory = self.place.scratch(py, scratch)?;
        let scratch = Buffer { name: "scratch", address: memory.start() as u64, bytes: scratch };
        let mut queue = Queue { gpu: self.gpu, stream: self.place.stream(py)?, scratch };
        Ok(py.detach(|| work(&mut queue))?)
    }
}

impl Tensor {
    /// The tensor as memory of a device.
    pub fn buffer(&self) -> Buffer {
        let bytes = self.shape().iter().product::<usize>() * self.element().bytes();
        Buffer { name: self.name(), address: self.ptr().addr() as u64, bytes }
    }

    /// The floating-point type of the elements, if the CUDA kernels have it.
    pub fn cuda_float(&self) -> Result<CudaType> {
        match self.element() {
            Element::F32 => Ok(CudaType::F32),
            Element::Bf16 => Ok(CudaType::Bf16),
            Element::F16 => Ok(CudaType::F16),
            other => Err(Error::Type(format!(
                "{}: expected dtype float32, bfloat16 or float16 on a GPU, got {}; the CPU backend has float64",
                self.name(),
                other.name()
            ))),
        }
    }
}

/// The memory of an optional tensor, or null.
pub fn buffer(tensor: &Option<Tensor>) -> Buffer {
    tensor.as_ref().map_or(Buffer::default(), Tensor::buffer)
}
