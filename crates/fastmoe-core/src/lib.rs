//! What a Mixture-of-Experts routing plan is: scores, top-k, capacity and the stable sort by expert.
//!
//! This crate is the specification of the plan; it knows no tensor library, no SIMD intrinsic and no GPU, and
//! every backend must produce the same plan to the bit.
//!
//! T tokens, E experts, K experts per token, R = T*K routed rows, C capacity (rows per expert). Rows are numbered
//! flat, `i = t * K + k`.
#![forbid(unsafe_code)]

mod capacity;
mod elementary;
mod error;
mod exp;
mod float;
mod grad_route;
mod groups;
mod parallel;
mod plan;
mod route;
mod score;
mod sort;
mod topk;
mod update;
mod validate;

pub use capacity::{Capacity, Drop};
pub use error::Error;
pub use float::Float;
pub use grad_route::{Routed, grad_route_rows};
pub use groups::{GroupLosers, GroupScore, Groups};
pub use parallel::{Parallel, Serial};
pub use plan::{ExpertId, OutOfRange, PlanOut, PlanSpec};
pub use route::{Order, PerExpert, Router, route_rows};
pub use score::Score;
pub use update::Update;
pub use validate::{validate_gather, validate_ids, validate_inverse, validate_offsets, validate_plan};
