//! `fastmoe-core` through a C interface: what the planning kernels must equal. `oracle.h` mirrors the structs.
//!
//! T tokens, E experts, K experts per token.

use fastmoe_core::{
    Capacity, Drop, Error, GroupLosers, GroupScore, Groups, Order, OutOfRange, PerExpert, PlanOut, PlanSpec,
    Router, Score, Serial, route_rows,
};
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// A call of [`route_rows`]; numbers stand for the variants as in the kernels.
#[repr(C)]
pub struct Route {
    tokens: i32,
    experts: i32,
    top_k: i32,
    score: i32,
    order: i32,
    renormalize: i32,
    eps: f32,
    scale: f32,
    softcap: f32,
    n_group: i32,
    topk_group: i32,
    group_score: i32,
    group_losers: i32,
    logits: *const f32,
    bias: *const f32,
    expert_scale: *const f32,
    ids: *mut i64,
    weights: *mut f32,
    scores: *mut f32,
}

/// A call of [`PlanSpec::build`]; a negative capacity is none.
#[repr(C)]
pub struct Plan {
    tokens: i32,
    experts: i32,
    top_k: i32,
    capacity: i32,
    pad: i32,
    drop_by_score: i32,
    ids: *const i64,
    weights: *const f32,
    counts: *mut i32,
    offsets: *mut i32,
    gather: *mut i32,
    inverse: *mut i32,
    sorted_weights: *mut f32,
}

/// `n` numbers; the pointer of no numbers may be null.
///
/// # Safety
/// `p` is valid for `n` numbers.
unsafe fn slice<'a, T>(p: *const T, n: usize) -> &'a [T] {
    // SAFETY: as promised by the caller.
    if n == 0 { &[] } else { unsafe { from_raw_parts(p, n) } }
}

/// As [`slice`].
///
/// # Safety
/// As [`slice`], and nobody else uses the numbers.
unsafe fn slice_mut<'a, T>(p: *mut T, n: usize) -> &'a mut [T] {
    // SAFETY: as promised by the caller.
    if n == 0 { &mut [] } else { unsafe { from_raw_parts_mut(p, n) } }
}

/// As [`slice`]; none from a null pointer.
///
/// # Safety
/// `p` is null or valid for `n` numbers.
unsafe fn optional<'a, T>(p: *const T, n: usize) -> Option<&'a [T]> {
    // SAFETY: as promised by the caller.
    (n == 0 || !p.is_null()).then(|| unsafe { slice(p, n) })
}

/// Routes every token.
///
/// # Safety
/// The pointers are valid for their shapes; bias and `expert_scale` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn oracle_route(p: &Route) {
    let [tokens, experts, top_k] = [p.tokens, p.experts, p.top_k].map(|n| n as usize);
    let router = Router {
        top_k,
        softcap: (p.softcap != 0.0).then(|| p.softcap.into()),
        score: [Score::Softmax, Score::Sigmoid, Score::SqrtSoftplus][p.score as usize],
        order: [Order::ScoreTopk, Order::TopkScore][p.order as usize],
        groups: (p.n_group != 0).then(|| Groups {
            n_group: p.n_group as usize,
            topk_group: p.topk_group as usize,
            score: [GroupScore::Max, GroupScore::Top2][p.group_score as usize],
            losers: [GroupLosers::NegInfinity, GroupLosers::Zero][p.group_losers as usize],
        }),
        renormalize: p.renormalize != 0,
        renormalize_eps: p.eps.into(),
        scale: p.scale.into(),
    };
    // SAFETY: as promised by the caller.
    unsafe {
        route_rows(
            &router,
            experts,
            slice(p.logits, tokens * experts),
            PerExpert { bias: optional(p.bias, experts), scale: optional(p.expert_scale, experts) },
            slice_mut(p.ids, tokens * top_k),
            slice_mut(p.weights, tokens * top_k),
            slice_mut(p.scores, tokens * experts),
        );
    }
}

/// Builds the plan with ids out of range dropped; returns the flat index of the first of those, or -1.
///
/// # Safety
/// The pointers are valid for their shapes; weights and `sorted_weights` may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn oracle_plan(p: &Plan) -> i32 {
    let [tokens, experts, top_k] = [p.tokens, p.experts, p.top_k].map(|n| n as usize);
    let capacity = usize::try_from(p.capacity).ok().map(|rows| Capacity {
        rows,
        drop: if p.drop_by_score != 0 { Drop::Score } else { Drop::Position },
        pad: p.pad != 0,
    });
    let build = |out_of_range| {
        let spec = PlanSpec { tokens, top_k, experts, capacity, out_of_range };
        // SAFETY: as promised by the caller.
        unsafe {
            let out = PlanOut {
                counts: slice_mut(p.counts, experts),
                offsets: slice_mut(p.offsets, experts + 1),
                gather: slice_mut(p.gather, spec.rows()),
                inverse: slice_mut(p.inverse, tokens * top_k),
                sorted_weights: (!p.sorted_weights.is_null())
                    .then(|| slice_mut(p.sorted_weights, spec.rows())),
            };
            let weights = optional(p.weights, tokens * top_k);
            spec.build(&Serial, slice(p.ids, tokens * top_k), weights, out)
        }
    };
    let first_bad = match build(OutOfRange::Error) {
        Err(Error::ExpertId { token, slot, .. }) => (token * top_k + slot) as i32,
        other => other.map_or_else(|error| panic!("{error}"), |()| -1),
    };
    build(OutOfRange::Drop).unwrap_or_else(|error| panic!("{error}"));
    first_bad
}
