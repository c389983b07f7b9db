//! The backward pass from x and the saved pre-activation; the activation is computed again.

use crate::combine::Combine;
use crate::dtype::Element;
use crate::gemm::{Product, sums_len};
use crate::grad_weight::GradWeight;
use crate::layer::{BLOCK_COLS, Layer, PackedRows, WIDE_COLS, Work, split_pairs};
use crate::machine::{Machine, Op};
use crate::math::dot;
use crate::matrix::Matrix;
use crate::memory::Scratch;
use crate::pack::Rows;
use crate::problem::{Mlp, MlpGrads, Ptr};
use fastmoe_core::Float;
use std::ops::Range;

/// The gradients that `grads` asks for.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes and the plan is validated.
pub unsafe fn backward<M: Machine, E: Element<Acc = M::Acc>>(
    p: &Mlp<'_>,
    hidden: Ptr,
    grad_out: Ptr,
    grads: &MlpGrads,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        let layer = Layer::<M, E>::new(p, true);
        let rows = layer.rows();
        let grad_out_rows = Rows::<E>::gathered(grad_out.cast(), p.hidden, p.rows.gather);
        let through =
            grads.x.is_some() || grads.weights.is_some() || grads.w1.is_some() || grads.b1.is_some();
        let grad_h = PackedRows::new::<M>(if through { rows } else { 0 }, layer.up_cols());
        let act = PackedRows::new::<M>(if grads.w2.is_some() { rows } else { 0 }, p.intermediate);
        let slopes = Scratch::new(if grads.weights.is_some() { slope_parts(p) * rows } else { 0 });
        if through || grads.w2.is_some() {
            let grad_out = through
                .then(|| PackedRows::pack::<M, E>(grad_out_rows, rows, p.hidden, &layer.work, layer.threads));
            let job = Hidden {
                layer: &layer,
                grad_out: grad_out.as_ref(),
                saved: hidden.cast::<E>(),
                grad_h: &grad_h,
                act: grads.w2.is_some().then_some(&act),
                slopes: grads.weights.is_some().then_some(&slopes),
            };
            layer.threads.for_each(layer.work.len() * layer.blocks(), |task| {
                M::begin();
                M::call(HiddenTask { job: &job, task });
                M::end();
            });
        }
        if let Some(out) = grads.weights {
            let b2 = p.b2.map(<*const u8>::cast::<E>);
            let job =
                RouteGrad { layer: &layer, slopes: &slopes, grad_out: grad_out.cast(), b2, out: out.cast() };
            job.run();
        }
        if let Some(out) = grads.x {
            Combine {
                layer: &layer,
                a: &grad_h,
                inner: layer.up_cols(),
                factor: &|e| layer.w1(e).t(),
                bias: None,
                scaled: false,
                out: out.cast::<E>(),
            }
            .run();
        }
        let packed_h = Matrix::Packed(&grad_h, layer.up_cols());
        let packed_act = Matrix::Packed(&act, p.intermediate);
        let x = Matrix::Gathered(Rows::<E>::gathered(p.x.cast(), p.hidden, p.rows.gather), p.hidden);
        let grad_y = Matrix::Gathered(grad_out_rows, p.hidden);
        let weights = GradWeight { offsets: p.rows.offsets, work: &layer.work, threads: layer.threads };
        if let Some(out) = grads.w1 {
            let (rows, cols) = if p.transposed { (x, packed_h) } else { (packed_h, x) };
            weights.matrix::<M, E>(rows, cols, out);
        }
        if let Some(out) = grads.w2 {
            let (rows, cols) = if p.transposed { (packed_act, grad_y) } else { (grad_y, packed_act) };
            weights.matrix::<M, E>(rows, cols, out);
        }
        if let Some(out) = grads.b1 {
            weights.bias::<M, E>(packed_h, None, out.cast());
        }
        if let Some(out) = grads.b2 {
            weights.bias::<M, E>(grad_y, Some(&layer.scales), out.cast());
        }
    }
}

/// From the gradient of the output to that of the pre-activation.
struct Hidden<'a, M: Machine, E> {
    layer: &'a Layer<'a, M, E>,
    /// Absent where only the activation is wanted.
    grad_out: Option<&'a PackedRows<M::Acc>>,
    saved: *const E,
    grad_h: &'a PackedRows<M::Acc>,
    /// The activation times the routing weight, for dW2.
    act: Option<&'a PackedRows<M::Acc>>,
    /// `[slope_parts, rows]` parts of `<dL/d act, act>`.
    slopes: Option<&'a Scratch<M::Acc>>,
}

/// Hidden units whose products are summed at a time. Blocks are as wide as it or a multiple, for other numbers of
/// threads another one, on which no sum may depend.
const SLOPE_UNITS: usize = BLOCK_COLS;

fn slope_parts(p: &Mlp<'_>) -> usize {
    p.intermediate.div_ceil(SLOPE_UNITS)
}

// SAFETY: tasks write disjoint columns of `grad_h` and `act` and disjoint parts of `slopes`.
unsafe impl<M: Machine, E> Sync for Hidden<'_, M, E> {}

struct HiddenTask<'a, M: Machine, E> {
    job: &'a Hidden<'a, M, E>,
    task: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for HiddenTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let layer = self.job.layer;
        let work = &layer.work[self.task / layer.blocks()];
        // SAFETY: as promised by the caller.
        unsafe { if work.is_few::<M>() { self.run_on::<M::Few>(work) } else { self.run_on::<M>(work) } }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> HiddenTask<'_, M, E> {
    #[inline(always)]
    unsafe fn run_on<N: Machine<Acc = M::Acc>>(self, work: &Work) {
        let layer = self.job.layer;
        let block = self.task % layer.blocks();
        let (start, cols) = layer.block(block);
        let ahead = self.task + layer.threads.0;
        let next = layer
            .work
            .get(ahead / layer.blocks())
            .map(|work| layer.w2(work.expert).t().column(layer.block(ahead % layer.blocks()).0));
        let most = work.longest_chunk::<N>(cols);
        let sums = Scratch::<M::Acc>::new(sums_len::<N>(most, 1, cols));
        for rows in work.chunks::<N>(cols) {
            let mut stride = 0;
            // SAFETY: as promised by the caller of `backward`.
            unsafe {
                if let Some(grad_out) = self.job.grad_out {
                    let product = Product::<N, E> {
                        a: grad_out.row(rows.start),
                        a_stride: grad_out.stride,
                        rows: rows.len(),
                        inner: layer.p.hidden,
                        parts: &[layer.w2(work.expert).t().column(start)],
                        cols,
                        next,
                        c: sums.ptr(),
                    };
                    product.compute();
                    stride = product.c_stride();
                }
                self.job.finish::<N>(rows, block, sums.ptr(), stride);
            }
        }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> Hidden<'_, M, E> {
    /// Through the activation, row by row while the sums are in the cache.
    #[inline(always)]
    unsafe fn finish<N: Machine<Acc = M::Acc>>(
        &self,
        rows: Range<usize>,
        block: usize,
        sums: *const M::Acc,
        stride: usize,
    ) {
        let p = self.layer.p;
        let (start, len) = self.layer.block(block);
        let (parts, n) = self.layer.parts(block);
        let up_cols = self.layer.up_cols();
        let mut saved = [M::Acc::ZERO; 2 * WIDE_COLS];
        let mut halves = saved;
        let [mut out, mut scaled] = [[M::Acc::ZERO; WIDE_COLS]; 2];
        let pairs = p.interleaved && p.activation.gated();
        // SAFETY: as promised by the caller of `backward`; this task alone writes these columns.
        unsafe {
            for (i, r) in rows.enumerate() {
                let scale = self.layer.scales[r];
                for (q, part) in parts[..n].iter().enumerate() {
                    let row = self.saved.add(r * up_cols + part.start);
                    E::widen::<N::V>(
                        std::slice::from_raw_parts(row, part.len),
                        &mut saved[q * len..][..part.len],
                    );
                }
                if pairs {
                    let (gate, up) = halves[..2 * len].split_at_mut(len);
                    split_pairs(&saved, gate, up);
                }
                let (gate, up) = if pairs { &mut halves } else { &mut saved }[..2 * len].split_at_mut(len);
                let out = &mut out[..len];
                if self.grad_out.is_some() {
                    let grad = std::slice::from_raw_parts(sums.add(i * stride), len);
                    for (s, &g) in scaled.iter_mut().zip(grad) {
                        *s = g * scale;
                    }
                    p.activation.backward(&scaled[..len], gate, up, out);
                    if let Some(slopes) = self.slopes {
                        let parts = grad.chunks(SLOPE_UNITS).zip(out.chunks(SLOPE_UNITS));
                        for (i, (grad, out)) in (start / SLOPE_UNITS..).zip(parts) {
                            *slopes.ptr().add(i * self.layer.rows() + r) = dot(grad, out);
                        }
                    }
                    if pairs {
                        let (gate, up) = halves[..2 * len].split_at(len);
                        for ((pair, &g), &u) in saved.chunks_exact_mut(2).zip(gate).zip(up) {
                            (pair[0], pair[1]) = (g, u);
                        }
                    }
                    for (q, part) in parts[..n].iter().enumerate() {
                        self.grad_h.write::<N>(r, part.start, &saved[q * len..][..part.len]);
                    }
                } else {
                    let (gate, up) = (&*gate, &*up);
                    p.activation.forward(gate, up, out);
                }
                if let Some(act) = self.act {
                    for o in out.iter_mut() {
                        *o = *o * scale;
                    }
                    act.write::<N>(r, start, out);
                }
            }
        }
    }
}

/// `dL/d weights[t,k] = <dL/d out[t], y[t,k]>`, from the parts that the hidden tasks left.
struct RouteGrad<'a, M: Machine, E> {
    layer: &'a Layer<'a, M, E>,
    slopes: &'a Scratch<M::Acc>,
    grad_out: *const E,
    b2: Option<*const E>,
    out: *mut M::Acc,
}

// SAFETY: tasks write disjoint tokens of `out`.
unsafe impl<M: Machine, E> Sync for RouteGrad<'_, M, E> {}

impl<M: Machine, E: Element<Acc = M::Acc>> RouteGrad<'_, M, E> {
    unsafe fn run(&self) {
        const AT_ONCE: usize = 64;
        let tokens = self.layer.p.tokens;
        self.layer.threads.for_each(tokens.div_ceil(AT_ONCE), |i| {
            let tokens = i * AT_ONCE..tokens.min((i + 1) * AT_ONCE);
            // SAFETY: as promised by the caller of `backward`.
            unsafe { M::call(RouteGradTask { all: self, tokens }) }
        });
    }
}

struct RouteGradTask<'a, M: Machine, E> {
    all: &'a RouteGrad<'a, M, E>,
    tokens: Range<usize>,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for RouteGradTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let RouteGrad { layer, slopes, grad_out, b2, out } = *self.all;
        let (p, rows) = (layer.p, layer.rows());
        let expert_of = |row: usize| p.rows.offsets.partition_point(|&o| o as usize <= row) - 1;
        let mut grad = vec![M::Acc::ZERO; if b2.is_some() { p.hidden } else { 0 }];
        let mut bias = grad.clone();
        for t in self.tokens {
            // SAFETY: as promised by the caller of `backward`; the token is this task's.
            unsafe {
                if b2.is_some() {
                    E::widen::<M::V>(
                        std::slice::from_raw_parts(grad_out.add(t * p.hidden), p.hidden),
                        &mut grad,
                    );
                }
                for i in t * p.top_k..(t + 1) * p.top_k {
                    let mut total = M::Acc::ZERO;
                    if let Ok(row) = usize::try_from(p.rows.inverse[i]) {
                        for part in 0..slope_parts(p) {
                            total += slopes[part * rows + row];
                        }
                        if let Some(b2) = b2 {
                            let b2 = b2.add(expert_of(row) * p.hidden);
                            E::widen::<M::V>(std::slice::from_raw_parts(b2, p.hidden), &mut bias);
                            total += dot(&grad, &bias);
                        }
                    }
                    *out.add(i) = total;
                }
            }
        }
    }
}
