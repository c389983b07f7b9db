//! The router of `fastmoe-core` and its gradient, compiled for the instruction set in use and spread over the threads.

use crate::dtype::Element;
use crate::machine::{Machine, Op};
use crate::memory::Scratch;
use crate::problem::{Ptr, PtrMut};
use crate::threads::Threads;
use fastmoe_core::{Float, PerExpert, Routed, Router, grad_route_rows, route_rows};
use std::marker::PhantomData;
use std::ops::Range;
use std::slice::{from_raw_parts, from_raw_parts_mut};

/// Tokens of a task.
fn tokens_at_once(experts: usize) -> usize {
    16384usize.div_ceil(experts.max(1))
}

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
    pub threads: Threads,
}

// SAFETY: tasks write disjoint tokens of the outputs.
unsafe impl Sync for Route<'_> {}

/// Routes every token.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes.
pub unsafe fn route<M: Machine, E: Element<Acc = M::Acc>>(p: &Route<'_>) {
    let at_once = tokens_at_once(p.experts);
    p.threads.for_each(p.tokens.div_ceil(at_once), |i| {
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
            let logits = from_raw_parts(p.logits.cast::<E>().add(start), tokens * experts);
            let of_experts = |values: Ptr| from_raw_parts(values.cast::<M::Acc>(), experts);
            let per_expert =
                PerExpert { bias: p.bias.map(of_experts), scale: p.expert_scale.map(of_experts) };
            let ids = from_raw_parts_mut(p.ids.add(chosen), tokens * top_k);
            let weights = p.weights.cast::<M::Acc>().add(chosen);
            let weights = from_raw_parts_mut(weights, tokens * top_k);
            let scores = p.scores.cast::<M::Acc>().add(start);
            let scores = from_raw_parts_mut(scores, tokens * experts);
            if E::WIDE {
                let logits = from_raw_parts(logits.as_ptr().cast::<M::Acc>(), logits.len());
                route_rows(p.router, experts, logits, per_expert, ids, weights, scores);
            } else {
                let mut wide = Scratch::<M::Acc>::new(logits.len());
                E::widen::<M::V>(logits, &mut wide);
                route_rows(p.router, experts, &wide, per_expert, ids, weights, scores);
            }
        }
    }
}

/// What was routed, the gradients that came back, and where those of the inputs go; lengths and ids have been checked.
pub struct RouteGrad<'a> {
    /// How experts were chosen; checked against E.
    pub router: &'a Router,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// `[T, E]`.
    pub logits: Ptr,
    /// `[T*K]`.
    pub ids: &'a [i64],
    /// `[T, E]` of the type of sums.
    pub scores: Ptr,
    /// `[E]` of the type of sums.
    pub expert_scale: Option<Ptr>,
    /// `[T, K]` of the type of sums, or zeros.
    pub grad_weights: Option<Ptr>,
    /// `[T, E]` of the type of sums, or zeros.
    pub grad_scores: Option<Ptr>,
    /// `[T, E]` like the logits.
    pub grad_logits: PtrMut,
    /// `[E]` of the type of sums, where wanted.
    pub grad_expert_scale: Option<PtrMut>,
    /// Worker threads to use at most.
    pub threads: Threads,
}

// SAFETY: tasks write disjoint tokens of the outputs.
unsafe impl Sync for RouteGrad<'_> {}

/// The gradients of the logits and of the scale of every expert, which is summed in the order of the tokens.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes.
pub unsafe fn route_backward<M: Machine, E: Element<Acc = M::Acc>>(p: &RouteGrad<'_>) {
    let top_k = p.router.top_k;
    let by_choice = p.grad_expert_scale.map(|_| Scratch::<M::Acc>::new(p.tokens * top_k));
    let by_choice_at = by_choice.as_ref().map(|by_choice| SharedPtr(by_choice.ptr()));
    let at_once = tokens_at_once(p.experts);
    p.threads.for_each(p.tokens.div_ceil(at_once), |i| {
        let tokens = i * at_once..p.tokens.min((i + 1) * at_once);
        let by_choice = by_choice_at.as_ref().map(|start| start.at(tokens.start * top_k));
        // SAFETY: as promised by the caller.
        unsafe { M::call(RouteGradTask::<M, E> { p, tokens, by_choice, types: PhantomData }) }
    });
    if let (Some(out), Some(by_choice)) = (p.grad_expert_scale, &by_choice) {
        // SAFETY: as promised by the caller.
        let sums = unsafe { from_raw_parts_mut(out.cast::<M::Acc>(), p.experts) };
        sums.fill(M::Acc::ZERO);
        for (&id, &of_choice) in p.ids.iter().zip(&**by_choice) {
            sums[id as usize] += of_choice;
        }
    }
}

/// Memory of which every task has its part.
struct SharedPtr<T>(*mut T);

// SAFETY: tasks write disjoint parts.
unsafe impl<T> Sync for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

struct RouteGradTask<'a, M: Machine, E> {
    p: &'a RouteGrad<'a>,
    tokens: Range<usize>,
    by_choice: Option<*mut M::Acc>,
    types: PhantomData<(M, E)>,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for RouteGradTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let p = self.p;
        let (experts, top_k) = (p.experts, p.router.top_k);
        let (start, len) = (self.tokens.start * experts, self.tokens.len() * experts);
        let choices = self.tokens.start * top_k..self.tokens.end * top_k;
        // SAFETY: as promised by the caller of `route_backward`; these tokens are this task's.
        unsafe {
            let rows = |values: Ptr| from_raw_parts(values.cast::<M::Acc>().add(start), len);
            let routed = |logits| Routed {
                logits,
                ids: &p.ids[choices.clone()],
                scores: rows(p.scores),
                expert_scale: p.expert_scale.map(|scale| from_raw_parts(scale.cast::<M::Acc>(), experts)),
                grad_weights: p
                    .grad_weights
                    .map(|grad| from_raw_parts(grad.cast::<M::Acc>().add(choices.start), choices.len())),
                grad_scores: p.grad_scores.map(rows),
            };
            let by_choice = self.by_choice.map(|start| from_raw_parts_mut(start, choices.len()));
            if E::WIDE {
                let grad = from_raw_parts_mut(p.grad_logits.cast::<M::Acc>().add(start), len);
                grad_route_rows(p.router, experts, &routed(rows(p.logits)), grad, by_choice);
            } else {
                let [mut logits, mut grad] = [(); 2].map(|()| Scratch::<M::Acc>::new(len));
                E::widen::<M::V>(from_raw_parts(p.logits.cast::<E>().add(start), len), &mut logits);
                grad_route_rows(p.router, experts, &routed(&logits), &mut grad, by_choice);
                E::narrow::<M::V>(&grad, from_raw_parts_mut(p.grad_logits.cast::<E>().add(start), len));
            }
        }
    }
}
