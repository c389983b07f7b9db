//! CPU backend: the expert MLP over a routing plan, forward and backward.
//!
//! T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
//! Tensors arrive as raw pointers to dense row-major memory; the caller has checked shapes and dtypes. Every function
//! may fail with [`Error::OutOfMemory`], and leaves any numbers in its outputs then.

mod activation;
#[cfg(target_arch = "x86_64")]
mod amx;
mod backward;
mod codes;
mod combine;
mod dispatch;
mod dots;
mod dtype;
mod error;
mod forward;
mod gemm;
mod grad_weight;
mod grouped;
mod isa;
mod layer;
mod machine;
mod math;
mod matrix;
pub mod memory;
mod pack;
mod permute;
mod prefetch;
mod problem;
mod quantized;
mod route;
mod row_pointers;
mod scaled;
mod simd;
#[cfg(test)]
mod tests;
mod threads;
mod turned;

pub use activation::Activation;
pub use dtype::DType;
pub use error::Error;
pub use isa::{CpuInfo, Isa, cpu_info, isa};
pub use permute::{Unpermute, permute};
pub use problem::{Format, GroupedMm, Mlp, MlpGrads, Ptr, PtrMut, RoutedRows, Weight};
pub use route::{Route, RouteGrad};
pub use threads::{Threads, find_openmp};

use dispatch::dispatch;
use error::catch;
use fastmoe_core::Update;

/// `out[t] = sum_k weights[t,k] (act(x W1^T + b1) W2^T + b2)`; keeps the pre-activation `[rows, 2I]` in
/// `hidden` where wanted.
///
/// # Safety
/// Every pointer is valid for the sizes in `p`, `out` and `hidden` overlap nothing, and the plan has been
/// checked by `fastmoe_core::validate_plan`.
pub unsafe fn mlp_forward(p: &Mlp<'_>, out: PtrMut, hidden: Option<PtrMut>) -> Result<(), Error> {
    use forward::forward;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(p.dtype, forward(p, out, hidden)) })
}

/// The gradients that `grads` asks for, from the saved pre-activation.
///
/// # Safety
/// As `mlp_forward`, for the gradients too.
pub unsafe fn mlp_backward(p: &Mlp<'_>, hidden: Ptr, grad_out: Ptr, grads: &MlpGrads) -> Result<(), Error> {
    use backward::backward;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(p.dtype, backward(p, hidden, grad_out, grads)) })
}

/// `out[r] = x[r] W_e^T + bias_e` for the rows of each expert, zeros after the last.
///
/// # Safety
/// Every pointer is valid for the sizes in `p`, `out` overlaps nothing, the offsets rise from 0 to at most `rows`.
pub unsafe fn grouped_mm(
    p: &GroupedMm<'_>,
    x: Ptr,
    w: Ptr,
    bias: Option<Ptr>,
    out: PtrMut,
) -> Result<(), Error> {
    use grouped::grouped;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(p.dtype, grouped(p, x, w, bias, out)) })
}

/// `grad_w[e] = grad_out_e^T x_e` (transposed where W is), or added to it, and `grad_bias[e]`.
///
/// # Safety
/// As `grouped_mm`.
pub unsafe fn grouped_mm_grad_weight(
    p: &GroupedMm<'_>,
    grad_out: Ptr,
    x: Ptr,
    grad_w: (PtrMut, Update),
    grad_bias: Option<PtrMut>,
) -> Result<(), Error> {
    use grouped::grouped_grad_weight;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(p.dtype, grouped_grad_weight(p, grad_out, x, grad_w, grad_bias)) })
}

/// `out[t] = sum_k weights[t,k] y[inverse[t,k]]`; -1 adds nothing.
///
/// # Safety
/// Every pointer is valid for the sizes in `p`; `inverse` holds rows of `y` and -1; `out` has a row for each token and
/// overlaps nothing.
pub unsafe fn unpermute(dtype: DType, p: &Unpermute<'_>, out: PtrMut) -> Result<(), Error> {
    use permute::unpermute;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(dtype, unpermute(p, out)) })
}

/// `grad_y[inverse[t,k]] = weights[t,k] grad_out[t]`, `grad_weights[t,k] = <grad_out[t], y[inverse[t,k]]>`.
///
/// # Safety
/// As `unpermute`; `grad_y` has a row for each entry of `gather`, and no two entries of `inverse` of different
/// tokens name one row.
pub unsafe fn unpermute_backward(
    dtype: DType,
    p: &Unpermute<'_>,
    grad_out: Ptr,
    gather: &[i32],
    grad_y: Option<PtrMut>,
    grad_weights: Option<PtrMut>,
) -> Result<(), Error> {
    use permute::unpermute_backward;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(dtype, unpermute_backward(p, grad_out, gather, grad_y, grad_weights)) })
}

/// Chooses the experts of every token (`fastmoe_core::route_rows`).
///
/// # Safety
/// Every pointer is valid for the sizes in `p`; the outputs overlap nothing.
pub unsafe fn route(dtype: DType, p: &Route<'_>) -> Result<(), Error> {
    use route::route;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(dtype, route(p)) })
}

/// The gradients of `route` (`fastmoe_core::grad_route_rows`).
///
/// # Safety
/// Every pointer is valid for the sizes in `p`; the ids have been checked by `fastmoe_core::validate_ids`; the outputs
/// overlap nothing.
pub unsafe fn route_backward(dtype: DType, p: &RouteGrad<'_>) -> Result<(), Error> {
    use route::route_backward;
    // SAFETY: as promised by the caller; the instruction set is one that this machine has.
    catch(|| unsafe { dispatch!(dtype, route_backward(p)) })
}
