//! Which backend works on the arguments of a call.

use fastmoe_cuda::{Buffer, DType as CudaType, Gpu, Math, Queue};
use pyo3::intern;
use pyo3::prelude::*;
use smallvec::SmallVec;

use crate::element::Element;
use crate::error::Result;
use crate::place::Place;
use crate::tensor::{Tensor, common_place, disjoint, wrong_dtype};

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
    /// The backend of the place where all arguments are; fails also where outputs share memory.
    pub fn of<'a>(
        inputs: impl IntoIterator<Item = Option<&'a Tensor>>,
        outputs: impl IntoIterator<Item = Option<&'a Tensor>>,
    ) -> Result<Self> {
        let mut tensors: SmallVec<[&Tensor; 20]> = inputs.into_iter().flatten().collect();
        let inputs = tensors.len();
        tensors.extend(outputs.into_iter().flatten());
        disjoint(&tensors, inputs)?;
        let place = common_place(&tensors)?;
        Ok(match place {
            Place::Cpu if !fastmoe_cuda::emulating() => Self::Cpu,
            Place::Cpu => Self::Cuda(Device { gpu: Gpu::get(0)?, place }),
            Place::Cuda(index) => Self::Cuda(Device { gpu: Gpu::get(index)?, place }),
        })
    }
}

impl Device {
    /// Queues the work on torch's current stream, the GIL released, with so many bytes of scratch memory.
    pub fn run<T: Send>(
        self,
        py: Python<'_>,
        scratch: usize,
        work: impl Send + FnOnce(&mut Queue<'_>) -> Result<T>,
    ) -> Result<T> {
        let memory = self.place.scratch(py, scratch)?;
        let scratch = Buffer { name: "scratch", address: memory.start() as u64, bytes: scratch };
        let mut queue = Queue { gpu: self.gpu, stream: self.place.stream(py)?, scratch };
        py.detach(|| work(&mut queue))
    }
}

/// Hands int32 indices to their check where `FASTMOE_CHECK=1` asks for it, which waits for the device.
pub fn check_indices<const N: usize>(
    queue: &Queue<'_>,
    indices: [&Tensor; N],
    check: impl FnOnce([&[i32]; N]) -> Result<(), fastmoe_core::Error>,
) -> Result<()> {
    if !fastmoe_cuda::checks() {
        return Ok(());
    }
    let mut copies = [const { Vec::new() }; N];
    for (copy, tensor) in copies.iter_mut().zip(indices) {
        // SAFETY: `Backend::of` has seen that the tensor is in memory of the queue's device.
        *copy = unsafe { queue.read(tensor.buffer())? };
    }
    Ok(check(copies.each_ref().map(Vec::as_slice))?)
}

/// Checks int64 expert ids `[T, K]` where `FASTMOE_CHECK=1` asks for it, which waits for the device.
pub fn check_ids(queue: &Queue<'_>, ids: &Tensor, top_k: usize, experts: usize) -> Result<()> {
    if !fastmoe_cuda::checks() {
        return Ok(());
    }
    // SAFETY: `Backend::of` has seen that the tensor is in memory of the queue's device.
    let words = unsafe { queue.read(ids.buffer())? };
    let (pairs, _) = words.as_chunks::<2>();
    let ids: Vec<i64> =
        pairs.iter().map(|&[low, high]| i64::from(high) << 32 | i64::from(low as u32)).collect();
    Ok(fastmoe_core::validate_ids(&ids, top_k, experts)?)
}

/// What the products of tensors like this one are computed in: float32 in full, or in tf32 where torch allows it.
pub fn math(py: Python<'_>, tensor: &Tensor) -> Result<Math> {
    let dtype = tensor.cuda_float()?;
    Ok(Math { dtype, tf32: dtype == CudaType::F32 && allows_tf32(py)? })
}

fn allows_tf32(py: Python<'_>) -> PyResult<bool> {
    let torch = py.import(intern!(py, "torch"))?;
    match torch.call_method0(intern!(py, "get_float32_matmul_precision")) {
        Ok(precision) => Ok(precision.extract::<String>()? != "highest"),
        // torch refuses to say it in the old words once it was set in the new ones.
        Err(_) => {
            let matmul = py.import("torch.backends.cuda")?.getattr("matmul")?;
            Ok(matmul.getattr("fp32_precision")?.extract::<String>()? == "tf32")
        }
    }
}

impl Tensor {
    /// The tensor as memory of a device.
    pub fn buffer(&self) -> Buffer {
        Buffer { name: self.name(), address: self.ptr().addr() as u64, bytes: self.bytes() }
    }

    /// The floating-point type of the elements, if the CUDA kernels have it.
    pub fn cuda_float(&self) -> Result<CudaType> {
        match self.element() {
            Element::F32 => Ok(CudaType::F32),
            Element::Bf16 => Ok(CudaType::Bf16),
            Element::F16 => Ok(CudaType::F16),
            given => {
                let wanted = "float32, bfloat16 or float16 on a GPU; the CPU backend has float64";
                Err(wrong_dtype(self.name(), given, wanted))
            }
        }
    }
}

/// The memory of an optional tensor, or null.
pub fn buffer(tensor: &Option<Tensor>) -> Buffer {
    tensor.as_ref().map_or(Buffer::default(), Tensor::buffer)
}
