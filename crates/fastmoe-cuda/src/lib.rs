//! CUDA backend: the Mixture-of-Experts layer on an NVIDIA GPU, or on the emulator that stands for one.
//!
//! Nothing here links to CUDA: the driver is loaded when a CUDA tensor first arrives. Every problem is queued on the
//! stream that its caller names, without waiting for the device; sizes that only the device knows stay there.
//!
//! T tokens, H hidden size, I intermediate size, E experts, K experts per token, N sorted rows.

pub mod driver;
mod dtype;
#[cfg_attr(not(feature = "emulator"), path = "no_emulator.rs")]
mod emulator;
mod error;
mod gpu;
mod grouped;
mod libcuda;
mod limits;
mod mlp;
mod plan;
mod products;
mod record;
mod route;
mod rows;
mod tiles;

pub use dtype::DType;
pub use error::{Error, Result};
pub use fastmoe_kernels::{Image, images, images_of};
pub use gpu::{Buffer, Gpu, Queue, checks, driver, emulating};
pub use mlp::{Mlp, MlpGrads};
pub use plan::Plan;
pub use products::{Factor, GradWeight, Product, Sizes};
pub use record::{Launch, mlp_launches};
pub use route::{Route, RouteGrad};
pub use rows::{Combine, GradBias, Permute, UnpermuteGrad};
pub use tiles::Math;

use gpu::scratch_size;
