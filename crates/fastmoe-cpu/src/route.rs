//! The router of `fastmoe-core`, compiled for the instruction set in use and spread over the threads.

use crate::dtype::Element;
use crate::machine::{Machine, Op};
use crate::memory::Scratch;
use crate::problem::{Ptr, PtrMut};
use crate::threads::Threads;
use fastmoe_core::{PerExpert, Router, route_rows};
use std::marker::PhantomData;
use std::ops::Range;

/// Logits and where the decision goes; the lengths have been checked.
pub struct Route<'a> {
    /// How experts are chosen; checked against E.
    pub router: &'a Router,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// `[T, E]`.
    pub logits: Ptr,
    /// `[E]` of the type of sums, for selection only.
    pub bias: Option<Ptr>,
    /// `[E]` of the type of sums, for the weights.
    pub expert_scale: Option<Ptr>,
    /// `[T, K]` i64.
    pub ids: *mut i64,
    /// `[T, K]` of the type of sums.
    pub weights: PtrMut,
    /// `[T, E]` of the type of sums.
    pub scores: PtrMut,
    /// Worker threads to use at most.
    pub threads: usize,
}

// SAFETY: tasks write disjoint tokens of the outputs.
unsafe impl Sync for Route<'_> {}

/// Routes every token.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes.
pub unsafe fn route<M: Machine, E: Element<Acc = M::Acc>>(p: &Route<'_>) {
    let at_once = 16384usize.div_ceil(p.experts.max(1));
    Threads(p.threads).for_each(p.tokens.div_ceil(at_once), |i| {
        let tokens = i * at_once..p.tokens.min((i + 1) * at_once);
        // SAFETY: as promised by the caller.
        unsafe { M::call(RouteTask::<M, E> { p, tokens, types: PhantomData }) }
    });
}

struct RouteTask<'a, M, E> {
    p: &'a Route<'a>,
    tokens: Range<usize>,
    types: PhantomData<(M, E)>,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for RouteTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let p = self.p;
        let (experts, top_k, tokens) = (p.experts, p.router.top_k, self.tokens.len());
        let (start, chosen) = (self.tokens.start * experts, self.tokens.start * top_k);
        // SAFETY: as promised by the caller of `route`; these tokens are this task's.
        unsafe {
            let logits = std::slice::from_raw_parts(p.logits.cast::<E>().add(start), tokens * experts);
            let of_experts = |values: Ptr| std::slice::from_raw_parts(values.cast::<M::Acc>(), experts);
            let per_expert =
                PerExpert { bias: p.bias.map(of_experts), scale: p.expert_scale.map(of_experts) };
            let ids = std::slice::from_raw_parts_mut(p.ids.add(chosen), tokens * top_k);
            let weights = p.weights.cast::<M::Acc>().add(chosen);
            let weights = std::slice::from_raw_parts_mut(weights, tokens * top_k);
            let scores = p.scores.cast::<M::Acc>().add(start);
            let scores = std::slice::from_raw_parts_mut(scores, tokens * experts);
            if E::WIDE {
                let logits = std::slice::from_raw_parts(logits.as_ptr().cast::<M::Acc>(), logits.len());
                route_rows(p.router, experts, logits, per_expert, ids, weights, scores);
            } else {
                let mut wide = Scratch::<M::Acc>::new(logits.len());
                E::widen(logits, &mut wide);
                route_rows(p.router, experts, &wide, per_expert, ids, weights, scores);
            }
        }
    }
}
