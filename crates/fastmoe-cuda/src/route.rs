//! The router on the device, with the bits of `fastmoe_core::route_rows`, and its gradient: the launches of `route.cu`
//! and `grad_route.cu`.

use crate::limits;
use crate::rows::{RESIDENT, blocks};
use crate::{Buffer, DType, Queue, Result, scratch_size};
use fastmoe_core::{GroupLosers, GroupScore, Order, Router, Score};

/// Logits to route, and where the decision goes.
#[derive(Clone, Copy)]
pub struct Route<'a> {
    /// The rules.
    pub router: &'a Router,
    /// Of the logits.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// `[T, E]`.
    pub logits: Buffer,
    /// `[E]` f32, or null.
    pub bias: Buffer,
    /// `[E]` f32, or null.
    pub expert_scale: Buffer,
    /// `[T, K]` i64.
    pub ids: Buffer,
    /// `[T, K]` f32.
    pub weights: Buffer,
    /// `[T, E]` f32.
    pub scores: Buffer,
}

/// Experts whose keys the kernel keeps in shared memory, which groups of experts need.
const KEPT: usize = 1024;
/// Its shared memory: two words for each of those, and four warps.
pub(crate) const SHARED: u32 = 4 * 2 * 4 * KEPT as u32;

fn score(score: Score) -> i32 {
    match score {
        Score::Softmax => 0,
        Score::Sigmoid => 1,
        Score::SqrtSoftplus => 2,
    }
}

fn order(order: Order) -> i32 {
    match order {
        Order::ScoreTopk => 0,
        Order::TopkScore => 1,
    }
}

impl Route<'_> {
    /// # Safety
    /// The buffers have these sizes and stay until the kernel has run; the router passes its check.
    pub unsafe fn launch(&self, queue: &Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            logits: u64,
            bias: u64,
            expert_scale: u64,
            ids: u64,
            weights: u64,
            scores: u64,
            bad_token: u64,
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
        }
        let router = self.router;
        if router.groups.is_some() {
            limits::at_most(KEPT, "E (experts) that are in groups", self.experts)?;
        }
        let params = Params {
            logits: self.logits.address,
            bias: self.bias.address,
            expert_scale: self.expert_scale.address,
            ids: self.ids.address,
            weights: self.weights.address,
            scores: self.scores.address,
            bad_token: 0,
            tokens: limits::rows("T (tokens)", self.tokens)?,
            experts: limits::rows("E (experts)", self.experts)?,
            top_k: limits::rows("K (experts per token)", router.top_k)?,
            score: score(router.score),
            order: order(router.order),
            renormalize: router.renormalize.into(),
            eps: router.renormalize_eps as f32,
            scale: router.scale as f32,
            softcap: router.softcap.unwrap_or(0.0) as f32,
            n_group: router.groups.map_or(0, |groups| groups.n_group as i32),
            topk_group: router.groups.map_or(0, |groups| groups.topk_group as i32),
            group_score: router.groups.map_or(0, |groups| match groups.score {
                GroupScore::Max => 0,
                GroupScore::Top2 => 1,
            }),
            group_losers: router.groups.map_or(0, |groups| match groups.losers {
                GroupLosers::NegInfinity => 0,
                GroupLosers::Zero => 1,
            }),
        };
        let memory = [
            self.logits.read(),
            self.bias.read(),
            self.expert_scale.read(),
            self.ids.read_write(),
            self.weights.write(),
            self.scores.write(),
        ];
        let resident = queue.gpu.device.resident(RESIDENT, SHARED);
        let blocks = blocks(queue.gpu, resident, self.tokens);
        // SAFETY: this is the kernel's struct, and as promised by the caller.
        unsafe { queue.launch(&["route", self.dtype.suffix()], blocks, &params, &memory) }
    }
}

/// The gradients of [`Route`], to the logits and to the scale that each expert has.
#[derive(Clone, Copy)]
pub struct RouteGrad<'a> {
    /// The rules; how groups were chosen does not matter.
    pub router: &'a Router,
    /// Of the logits and their gradient.
    pub dtype: DType,
    /// T.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// `[T, E]`.
    pub logits: Buffer,
    /// `[T, K]` i64; one that is no expert adds nothing.
    pub ids: Buffer,
    /// `[T, E]` f32.
    pub scores: Buffer,
    /// `[E]` f32, or null for ones.
    pub expert_scale: Buffer,
    /// `[T, K]` f32, or null for zeros.
    pub grad_weights: Buffer,
    /// `[T, E]` f32, or null for zeros.
    pub grad_scores: Buffer,
    /// `[T, E]`.
    pub grad_logits: Buffer,
    /// `[E]` f32, or null where not wanted.
    pub grad_expert_scale: Buffer,
}

impl RouteGrad<'_> {
    fn by_choice(&self) -> usize {
        if self.grad_expert_scale.is_null() { 0 } else { 4 * self.tokens * self.router.top_k }
    }

    /// Bytes of scratch memory.
    pub fn scratch(&self) -> usize {
        scratch_size(self.by_choice())
    }

    /// # Safety
    /// The buffers have these sizes and stay until the kernels have run; the router passes its check.
    pub unsafe fn launch(&self, queue: &mut Queue<'_>) -> Result<()> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Params {
            logits: u64,
            ids: u64,
            scores: u64,
            expert_scale: u64,
            grad_weights: u64,
            grad_scores: u64,
            grad_logits: u64,
            by_choice: u64,
            tokens: i32,
            experts: i32,
            top_k: i32,
            score: i32,
            order: i32,
            renormalize: i32,
            eps: f32,
            scale: f32,
            softcap: f32,
        }
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct ScaleParams {
            ids: u64,
            by_choice: u64,
            out: u64,
            rows: i32,
            experts: i32,
        }
        let router = self.router;
        let by_choice = match self.by_choice() {
            0 => Buffer::default(),
            bytes => queue.take("by_choice", bytes),
        };
        let params = Params {
            logits: self.logits.address,
            ids: self.ids.address,
            scores: self.scores.address,
            expert_scale: self.expert_scale.address,
            grad_weights: self.grad_weights.address,
            grad_scores: self.grad_scores.address,
            grad_logits: self.grad_logits.address,
            by_choice: by_choice.address,
            tokens: limits::rows("T (tokens)", self.tokens)?,
            experts: limits::rows("E (experts)", self.experts)?,
            top_k: limits::rows("K (experts per token)", router.top_k)?,
            score: score(router.score),
            order: order(router.order),
            renormalize: router.renormalize.into(),
            eps: router.renormalize_eps as f32,
            scale: router.scale as f32,
            softcap: router.softcap.unwrap_or(0.0) as f32,
        };
        let of_scale = ScaleParams {
            ids: self.ids.address,
            by_choice: by_choice.address,
            out: self.grad_expert_scale.address,
            rows: limits::rows("T*K (routed rows)", self.tokens * router.top_k)?,
            experts: params.experts,
        };
        let memory = [
            self.logits.read(),
            self.ids.read(),
            self.scores.read(),
            self.expert_scale.read(),
            self.grad_weights.read(),
            self.grad_scores.read(),
            self.grad_logits.write(),
            by_choice.write(),
        ];
        let blocks = blocks(queue.gpu, RESIDENT, self.tokens);
        // SAFETY: these are the structs of the kernels, and as promised by the caller.
        unsafe {
            queue.launch(&["grad_route", self.dtype.suffix()], blocks, &params, &memory)?;
            if !self.grad_expert_scale.is_null() {
                let memory = [self.ids.read(), by_choice.read(), self.grad_expert_scale.write()];
                queue.launch(&["grad_expert_scale"], self.experts, &of_scale, &memory)?;
            }
        }
        Ok(())
    }
}
