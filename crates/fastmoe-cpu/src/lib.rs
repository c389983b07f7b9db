//! CPU backend: the expert MLP over a routing plan, forward and backward.
//!
//! T tokens, H hidden size, I intermediate size, E experts, K experts per token, R routed rows.
//! Tensors arrive as raw pointers to dense row-major memory; the caller has checked shapes and dtypes.

mod activation;
mod dtype;
mod problem;

pub use activation::Activation;
pub use dtype::DType;
pub use problem::{GroupedMm, Mlp, MlpGrads, Ptr, PtrMut, RoutedRows};
