//! The second product of a pass: every token's sum over its experts, in expert order.
//!
//! A task owns some columns of the output for all tokens, so that no two tasks add to one number and the
//! order of the additions never changes.

use crate::dtype::Element;
use crate::gemm::{A_IN_CACHE, Factor, Product, sums_len};
use crate::layer::{BLOCK_COLS, Layer, PackedRows, WIDE_COLS, mostly_turned};
use crate::machine::{Machine, Op};
use crate::memory::Scratch;
use fastmoe_core::Float;

/// `out[token(r)] += scale[r] * (a[r] B_e + bias_e)` over the sorted rows r of every expert e.
pub struct Combine<'a, M: Machine, E> {
    /// The plan and its scales.
    pub layer: &'a Layer<'a, M, E>,
    /// Packed sorted rows.
    pub a: &'a PackedRows<M::Acc>,
    /// Length of the contraction.
    pub inner: usize,
    /// `[inner, H]` of an expert.
    pub factor: &'a (dyn Fn(usize) -> Factor<'a, E> + Sync),
    /// `[E, H]`.
    pub bias: Option<*const E>,
    /// Whether rows count by their routing weight, else by 1.
    pub scaled: bool,
    /// `[T, H]`.
    pub out: *mut E,
}

// SAFETY: tasks write disjoint columns of `out`.
unsafe impl<M: Machine, E> Sync for Combine<'_, M, E> {}

impl<M: Machine, E: Element<Acc = M::Acc>> Combine<'_, M, E> {
    /// Writes all of `out`.
    ///
    /// # Safety
    /// The machine has the instruction set; the pointers are valid for the layer's sizes.
    pub unsafe fn run(&self) {
        let hidden = self.layer.p.hidden;
        // More tasks divide the work more evenly; fewer read A less often, and long rows of B in longer runs.
        let small = self.layer.rows() * self.inner <= A_IN_CACHE && (self.factor)(0).is_nk();
        let share = hidden.div_ceil(if small { 8 } else { 2 } * self.layer.threads.0);
        let span = share.next_multiple_of(BLOCK_COLS).min(WIDE_COLS);
        self.layer.threads.for_each(hidden.div_ceil(span), |i| {
            M::begin();
            let (start, end) = (i * span, hidden.min((i + 1) * span));
            // SAFETY: as promised by the caller.
            unsafe { M::call(CombineTask { all: self, start, cols: end - start }) }
            M::end();
        });
    }
}

struct CombineTask<'t, 'a, M: Machine, E> {
    all: &'t Combine<'a, M, E>,
    start: usize,
    cols: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for CombineTask<'_, '_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let Combine { layer, out, .. } = *self.all;
        let (tokens, hidden) = (layer.p.tokens, layer.p.hidden);
        let scratch = (!E::WIDE).then(|| Scratch::<M::Acc>::new(tokens * self.cols));
        // SAFETY: these columns of `out` belong to this task; where E is the type of sums they hold the sums.
        unsafe {
            let (total, stride) = match &scratch {
                Some(scratch) => (scratch.ptr(), self.cols),
                None => (out.wrapping_add(self.start).cast::<M::Acc>(), hidden),
            };
            for t in 0..tokens {
                std::ptr::write_bytes(total.add(t * stride), 0, self.cols);
            }
            self.add_experts(total, stride);
            if scratch.is_some() {
                for t in 0..tokens {
                    let sums = std::slice::from_raw_parts(total.add(t * stride), self.cols);
                    let row = out.add(t * hidden + self.start);
                    E::narrow::<M::V>(sums, std::slice::from_raw_parts_mut(row, self.cols));
                }
            }
        }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> CombineTask<'_, '_, M, E> {
    #[inline(always)]
    unsafe fn add_experts(&self, total: *mut M::Acc, stride: usize) {
        let Combine { layer, factor, .. } = *self.all;
        // As in `block_cols`: long runs of B's memory, few of A's.
        let narrow = factor(0).is_nk() && !mostly_turned::<M>(&layer.work);
        let step = if narrow { BLOCK_COLS } else { WIDE_COLS };
        let most = layer.work.iter().map(|w| w.longest_chunk::<M>(step)).max().unwrap_or(0);
        let sums = Scratch::<M::Acc>::new(sums_len::<M>(most, 1, step));
        for (i, work) in layer.work.iter().enumerate() {
            // SAFETY: as promised by the caller of `run`.
            unsafe {
                if work.is_few::<M>() {
                    self.add_expert::<M::Few>(i, step, sums.ptr(), (total, stride));
                } else {
                    self.add_expert::<M>(i, step, sums.ptr(), (total, stride));
                }
            }
        }
    }

    /// The rows of expert `w` at work, `step` columns at a time.
    #[inline(always)]
    unsafe fn add_expert<N: Machine<Acc = M::Acc>>(
        &self,
        w: usize,
        step: usize,
        sums: *mut M::Acc,
        (total, stride): (*mut M::Acc, usize),
    ) {
        let Combine { layer, a, inner, factor, bias, .. } = *self.all;
        let work = &layer.work[w];
        let weight = factor(work.expert);
        let mut offset = [M::Acc::ZERO; WIDE_COLS];
        for rows in work.chunks::<N>(step) {
            for from in (0..self.cols).step_by(step) {
                let cols = step.min(self.cols - from);
                let next = if from + cols < self.cols {
                    Some(weight.column(self.start + from + cols))
                } else {
                    layer.work.get(w + 1).map(|work| factor(work.expert).column(self.start))
                };
                let product = Product::<N, E> {
                    a: a.row(rows.start),
                    a_stride: a.stride,
                    rows: rows.len(),
                    inner,
                    parts: &[weight.column(self.start + from)],
                    cols,
                    next,
                    c: sums,
                };
                // SAFETY: as promised by the caller of `run`.
                unsafe {
                    product.compute();
                    if let Some(bias) = bias {
                        let row = bias.add(work.expert * layer.p.hidden + self.start + from);
                        E::widen::<N::V>(std::slice::from_raw_parts(row, cols), &mut offset[..cols]);
                    }
                    for (i, r) in rows.clone().enumerate() {
                        let Ok(token) = usize::try_from(layer.p.rows.gather[r]) else { continue };
                        let sums = std::slice::from_raw_parts(sums.add(i * product.c_stride()), cols);
                        let total = std::slice::from_raw_parts_mut(total.add(token * stride + from), cols);
                        let scale = if self.all.scaled { layer.scales[r] } else { M::Acc::ONE };
                        for ((t, &s), &b) in total.iter_mut().zip(sums).zip(&offset) {
                            *t += scale * (s + b);
                        }
                    }
                }
            }
        }
    }
}
