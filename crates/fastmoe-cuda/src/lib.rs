//! CUDA backend: the Mixture-of-Experts layer on an NVIDIA GPU, or on the emulator that stands for one.
//!
//! Nothing here links to CUDA: the driver is loaded when a CUDA tensor first arrives.

pub mod driver;
mod error;
mod libcuda;

pub use error::{Error, Result};
pub use libcuda::Libcuda;
