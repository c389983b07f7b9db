//! What there is of CUDA: `images` of this build, `cuda_info` of this machine, `load_cuda` for one of its GPUs,
//! `mlp_launches` of any GPU.

use fastmoe_cuda::driver::{Access, Device};
use fastmoe_cuda::{Gpu, Image, Math, Sizes};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::at_least;
use crate::error::{Error, Result};

#[pyfunction]
#[pyo3(signature = (capability=None))]
pub fn images(py: Python<'_>, capability: Option<(u32, u32)>) -> Result<Vec<Bound<'_, PyDict>>> {
    let images: Vec<&Image> = match capability {
        None => fastmoe_cuda::images().iter().collect(),
        Some((major, minor)) => fastmoe_cuda::images_of(major, minor).collect(),
    };
    Ok(images.into_iter().map(|image| of_image(py, image)).collect::<PyResult<_>>()?)
}

fn of_image<'py>(py: Python<'py>, image: &Image) -> PyResult<Bound<'py, PyDict>> {
    let kernels = image.kernels.iter().map(|kernel| {
        let dict = PyDict::new(py);
        dict.set_item("name", kernel.name)?;
        dict.set_item("threads", kernel.threads)?;
        dict.set_item("shared_bytes", kernel.shared_bytes)?;
        dict.set_item("registers", kernel.registers)?;
        Ok(dict)
    });
    let dict = PyDict::new(py);
    dict.set_item("family", image.family)?;
    dict.set_item("arch", image.arch.name())?;
    dict.set_item("bytes", image.compressed_bytes())?;
    dict.set_item("kernels", kernels.collect::<PyResult<Vec<_>>>()?)?;
    Ok(dict)
}

#[pyfunction]
pub fn load_cuda(py: Python<'_>, device: i32) -> Result<()> {
    py.detach(|| Gpu::get(device))?;
    Ok(())
}

/// Asks the driver alone, which makes no context on any device.
#[pyfunction]
pub fn cuda_info(py: Python<'_>) -> Result<Bound<'_, PyDict>> {
    let driver = fastmoe_cuda::driver()?;
    let version = driver.version()?;
    let devices = (0..driver.device_count()?).map(|index| {
        let device = driver.device(index)?;
        let dict = PyDict::new(py);
        dict.set_item("name", device.name)?;
        dict.set_item("capability", device.capability)?;
        dict.set_item("multiprocessors", device.multiprocessors)?;
        dict.set_item("shared_bytes", device.shared_per_block)?;
        Ok(dict)
    });
    let dict = PyDict::new(py);
    dict.set_item("version", (version / 1000, version % 1000 / 10))?;
    dict.set_item("devices", devices.collect::<Result<Vec<_>>>()?)?;
    Ok(dict)
}

#[pyfunction]
#[pyo3(signature = (
    tokens, hidden, intermediate, experts, top_k, *,
    math, gated, bias, train, capability, multiprocessors, shared_bytes
))]
pub fn mlp_launches<'py>(
    py: Python<'py>,
    tokens: i64,
    hidden: i64,
    intermediate: i64,
    experts: i64,
    top_k: i64,
    math: &str,
    gated: bool,
    bias: bool,
    train: bool,
    capability: (u32, u32),
    multiprocessors: u32,
    shared_bytes: u32,
) -> Result<Vec<Bound<'py, PyDict>>> {
    let (tokens, top_k) = (at_least("tokens", 1, tokens)?, at_least("top_k", 1, top_k)?);
    let sizes = Sizes {
        math: Math::from_name(math).ok_or_else(|| {
            Error::wrong_value("math", format!("'{math}'"), "'bf16', 'f16', 'f32' or 'tf32'")
        })?,
        tokens,
        rows: tokens.saturating_mul(top_k),
        hidden: at_least("hidden", 1, hidden)?,
        intermediate: at_least("intermediate", 1, intermediate)?,
        experts: at_least("experts", 1, experts)?,
        activation: (0, gated),
        transposed: false,
        interleaved: false,
    };
    let device = Device { name: String::new(), capability, multiprocessors, shared_per_block: shared_bytes };
    let launches = fastmoe_cuda::mlp_launches(device, sizes, top_k, bias, train)?;
    let launches = launches.into_iter().map(|launch| {
        let memory = launch.memory.into_iter();
        let memory: Vec<_> =
            memory.map(|region| (region.name, region.bytes, use_of(region.access))).collect();
        let dict = PyDict::new(py);
        dict.set_item("kernel", launch.kernel)?;
        dict.set_item("blocks", launch.blocks)?;
        dict.set_item("memory", memory)?;
        Ok(dict)
    });
    Ok(launches.collect::<PyResult<_>>()?)
}

fn use_of(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Write => "write",
        Access::ReadWrite => "read_write",
    }
}
