//! The Python module `fastmoe_rs._native`: DLPack in, errors out, nothing else.
//!
//! Every function writes into tensors that its caller allocated; what they mean is told in `_native.pyi`.
//! T tokens, H hidden, I intermediate, E experts, K experts per token, R = T*K routed rows.
#![expect(clippy::too_many_arguments, reason = "those of the Python functions")]

mod array;
mod backend;
mod call;
mod cuda;
mod dlpack;
mod element;
mod error;
mod grouped;
mod info;
mod layer;
mod memory;
mod mlp;
mod permute;
mod place;
mod plan;
mod route;
mod tensor;
mod weight;

#[pyo3::pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::cuda::{cuda_info, images, load_cuda, mlp_launches};
    #[pymodule_export]
    use super::grouped::{grouped_mm, grouped_mm_grad_weight};
    #[pymodule_export]
    use super::info::cpu_info;
    #[pymodule_export]
    use super::memory::{empty, empty_cache, empty_like, memory_stats};
    #[pymodule_export]
    use super::mlp::{mlp_backward, mlp_forward};
    #[pymodule_export]
    use super::permute::{permute, unpermute, unpermute_backward};
    #[pymodule_export]
    use super::plan::plan;
    #[pymodule_export]
    use super::route::{route, route_backward};

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the Python name")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
