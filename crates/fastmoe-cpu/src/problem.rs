//! What the backend is asked to compute: pointers, sizes, and the plan that says which row goes where.

use crate::{Activation, DType, Threads};
use fastmoe_core::Update;

/// Address of a dense row-major input tensor.
pub type Ptr = *const u8;
/// Address of a dense row-major output tensor.
pub type PtrMut = *mut u8;

/// The rows of a routing plan (see `fastmoe_core::validate_plan`, which the caller has run).
#[derive(Clone, Copy)]
pub struct RoutedRows<'a> {
    /// `[E+1]` first sorted row of each expert.
    pub offsets: &'a [i32],
    /// `[rows]` token that feeds each sorted row, -1 where unused.
    pub gather: &'a [i32],
    /// `[T*K]` sorted row of each (token, k), -1 where dropped.
    pub inverse: &'a [i32],
}

/// How a quantized weight `[E, N, D]` holds its numbers, each of which is a code times a scale, rounded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Codes E2M1 `[E, N, D/2]`, two a byte, the low half first; scales E8M0 `[E, N, D/32]`.
    Mxfp4,
    /// Codes E4M3 `[E, N, D]`; scales f32 of squares of 128 x 128, `[E, ceil(N/128), ceil(D/128)]`.
    Fp8,
}

/// A weight `[E, N, D]`.
#[derive(Clone, Copy)]
pub enum Weight {
    /// Numbers of the dtype of x, which may be transposed.
    Plain(Ptr),
    /// Never transposed, and without a gradient.
    Quantized {
        /// What codes and scales mean.
        format: Format,
        /// The codes.
        codes: Ptr,
        /// The scales.
        scales: Ptr,
    },
}

/// The expert MLP: `out[t] = sum_k weights[t,k] * (act(x W1^T + b1) W2^T + b2)`.
#[derive(Clone, Copy)]
pub struct Mlp<'a> {
    /// Type of x, weights of the experts, biases, output and saved pre-activation.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// H.
    pub hidden: usize,
    /// I.
    pub intermediate: usize,
    /// E.
    pub experts: usize,
    /// K.
    pub top_k: usize,
    /// Activation between the projections.
    pub activation: Activation,
    /// W1 is `[E,H,2I]` and W2 `[E,I,H]`.
    pub transposed: bool,
    /// Gate and up alternate along the 2I axis.
    pub interleaved: bool,
    /// `[T,H]`.
    pub x: Ptr,
    /// `[E,2I,H]` (`[E,I,H]` ungated).
    pub w1: Weight,
    /// `[E,2I]`.
    pub b1: Option<Ptr>,
    /// `[E,H,I]`.
    pub w2: Weight,
    /// `[E,H]`.
    pub b2: Option<Ptr>,
    /// `[T,K]` routing weights, f64 when `dtype` is F64, else f32.
    pub weights: Ptr,
    /// The plan.
    pub rows: RoutedRows<'a>,
    /// Worker threads to use at most.
    pub threads: Threads,
}

/// Where the gradients go; `None` means not wanted and not computed.
#[derive(Clone, Copy, Default)]
pub struct MlpGrads {
    /// `[T,H]`.
    pub x: Option<PtrMut>,
    /// `[T,K]`, f64 when the dtype is F64, else f32.
    pub weights: Option<PtrMut>,
    /// Like W1.
    pub w1: Option<(PtrMut, Update)>,
    /// Like b1.
    pub b1: Option<PtrMut>,
    /// Like W2.
    pub w2: Option<(PtrMut, Update)>,
    /// Like b2.
    pub b2: Option<PtrMut>,
}

/// `out[r] = x[r] W[e]^T + bias[e]` for the rows of each expert.
#[derive(Clone, Copy)]
pub struct GroupedMm<'a> {
    /// Type of every tensor.
    pub dtype: DType,
    /// Contraction length (columns of x).
    pub inner: usize,
    /// Columns of the output.
    pub outer: usize,
    /// Rows of x.
    pub rows: usize,
    /// `[E+1]` first row of each expert.
    pub offsets: &'a [i32],
    /// W is `[E,inner,outer]` instead of `[E,outer,inner]`.
    pub transposed: bool,
    /// Worker threads to use at most.
    pub threads: Threads,
}
