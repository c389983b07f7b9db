//! The forward pass: up projection with the activation on its way out, down projection with the combine.

use crate::combine::Combine;
use crate::dtype::Element;
use crate::gemm::{Product, padded_cols, sums_len};
use crate::layer::{Layer, PackedRows, WIDE_COLS, Work, split_pairs};
use crate::machine::{Machine, Op};
use crate::memory::Scratch;
use crate::problem::{Mlp, PtrMut};
use fastmoe_core::Float;
use std::ops::Range;

/// `out = sum_k weights (act(x W1^T + b1) W2^T + b2)`; keeps the pre-activation in `hidden` where wanted.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes and the plan is validated.
pub unsafe fn forward<M: Machine, E: Element<Acc = M::Acc>>(
    p: &Mlp<'_>,
    out: PtrMut,
    hidden: Option<PtrMut>,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        let layer = Layer::<M, E>::new(p, false);
        let x = layer.gather(p.x, p.hidden);
        let act = PackedRows::new::<M>(layer.rows(), p.intermediate);
        let up = Up { layer: &layer, x: &x, act: &act, hidden: hidden.map(<*mut u8>::cast::<E>) };
        let tasks = layer.work.len() * layer.blocks();
        layer.threads.for_each(tasks, |task| {
            M::begin();
            M::call(UpTask { up: &up, task });
            M::end();
        });
        drop(x);
        Combine {
            layer: &layer,
            a: &act,
            inner: p.intermediate,
            factor: &|e| layer.w2(e),
            bias: p.b2.map(<*const u8>::cast::<E>),
            scaled: true,
            out: out.cast::<E>(),
        }
        .run();
    }
}

struct Up<'a, M: Machine, E> {
    layer: &'a Layer<'a, M, E>,
    x: &'a PackedRows<M::Acc>,
    act: &'a PackedRows<M::Acc>,
    hidden: Option<*mut E>,
}

// SAFETY: tasks write disjoint columns of `act` and `hidden`.
unsafe impl<M: Machine, E> Sync for Up<'_, M, E> {}

struct UpTask<'a, M: Machine, E> {
    up: &'a Up<'a, M, E>,
    task: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for UpTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let layer = self.up.layer;
        let work = &layer.work[self.task / layer.blocks()];
        // SAFETY: as promised by the caller.
        unsafe { if work.is_few::<M>() { self.run_on::<M::Few>(work) } else { self.run_on::<M>(work) } }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> UpTask<'_, M, E> {
    #[inline(always)]
    unsafe fn run_on<N: Machine<Acc = M::Acc>>(self, work: &Work) {
        let layer = self.up.layer;
        let block = self.task % layer.blocks();
        let (parts, n) = layer.parts(block);
        let factor = layer.w1(work.expert);
        let factors = parts.map(|part| factor.column(part.start));
        let ahead = self.task + layer.threads.0;
        let next = layer
            .work
            .get(ahead / layer.blocks())
            .map(|work| layer.w1(work.expert).column(layer.parts(ahead % layer.blocks()).0[0].start));
        let most = work.longest_chunk::<N>(n * parts[0].len);
        let sums = Scratch::<M::Acc>::new(sums_len::<N>(most, n, parts[0].len));
        for rows in work.chunks::<N>(n * parts[0].len) {
            let product = Product::<N, E> {
                a: self.up.x.row(rows.start),
                a_stride: self.up.x.stride,
                rows: rows.len(),
                inner: layer.p.hidden,
                parts: &factors[..n],
                cols: parts[0].len,
                next,
                c: sums.ptr(),
            };
            // SAFETY: as promised by the caller of `forward`.
            unsafe {
                product.compute();
                self.up.finish::<N>(work, rows, block, sums.ptr(), product.c_stride());
            }
        }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> Up<'_, M, E> {
    /// Bias, saved pre-activation, activation: row by row while the sums are in the cache.
    #[inline(always)]
    unsafe fn finish<N: Machine<Acc = M::Acc>>(
        &self,
        work: &Work,
        rows: Range<usize>,
        block: usize,
        sums: *mut M::Acc,
        stride: usize,
    ) {
        let p = self.layer.p;
        let (start, len) = self.layer.block(block);
        let (parts, n) = self.layer.parts(block);
        let width = padded_cols::<N>(parts[0].len);
        let up_cols = self.layer.up_cols();
        let mut bias = [[M::Acc::ZERO; 2 * WIDE_COLS]; 2];
        let [mut gate, mut up, mut out] = [[M::Acc::ZERO; WIDE_COLS]; 3];
        // SAFETY: as promised by the caller of `forward`; this task alone writes these columns.
        unsafe {
            if let Some(b1) = p.b1 {
                for (part, bias) in parts[..n].iter().zip(&mut bias) {
                    let b1 = b1.cast::<E>().add(work.expert * up_cols + part.start);
                    E::widen::<N::V>(std::slice::from_raw_parts(b1, part.len), &mut bias[..part.len]);
                }
            }
            for (i, r) in rows.enumerate() {
                let row = std::slice::from_raw_parts_mut(sums.add(i * stride), stride);
                for (q, part) in parts[..n].iter().enumerate() {
                    let sums = &mut row[q * width..][..part.len];
                    if p.b1.is_some() {
                        for (s, &b) in sums.iter_mut().zip(&bias[q]) {
                            *s += b;
                        }
                    }
                    if let Some(hidden) = self.hidden {
                        let saved = hidden.add(r * up_cols + part.start);
                        E::narrow::<N::V>(sums, std::slice::from_raw_parts_mut(saved, part.len));
                    }
                }
                let act = &mut out[..len];
                if p.activation.gated() && p.interleaved {
                    split_pairs(row, &mut gate[..len], &mut up[..len]);
                    p.activation.forward(&gate[..len], &up[..len], act);
                } else {
                    // Without a gate the second row is not read.
                    p.activation.forward(&row[..len], &row[stride - width..][..len], act);
                }
                self.act.write::<N>(r, start, act);
            }
        }
    }
}
