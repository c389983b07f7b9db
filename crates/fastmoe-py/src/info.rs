//! `cpu_info`: what the machine has and which kernels were chosen.

use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};

use crate::error::Result;

#[pyfunction]
pub fn cpu_info(py: Python<'_>) -> Result<Bound<'_, PyDict>> {
    let info = fastmoe_cpu::cpu_info()?;
    let dict = PyDict::new(py);
    dict.set_item("arch", info.arch)?;
    dict.set_item("features", info.features)?;
    dict.set_item("isa", info.isa)?;
    dict.set_item("available", info.available)?;
    dict.set_item("kernels", info.kernels.into_py_dict(py)?)?;
    dict.set_item("threads_pool", info.pool)?;
    Ok(dict)
}
