//! The grouped GEMM by itself: `out[r] = x[r] W_e^T + bias_e`.

use crate::dtype::Element;
use crate::gemm::{Factor, Product, sums_len};
use crate::grad_weight::GradWeight;
use crate::layer::{PackedRows, WIDE_COLS, Work, block_cols, work};
use crate::machine::{Machine, Op};
use crate::matrix::Matrix;
use crate::memory::Scratch;
use crate::pack::Rows;
use crate::problem::{GroupedMm, Ptr, PtrMut};
use fastmoe_core::{Float, Update};

/// The product of every expert's rows; rows past the last expert's become zeros.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes, the offsets rise from 0.
pub unsafe fn grouped<M: Machine, E: Element<Acc = M::Acc>>(
    p: &GroupedMm<'_>,
    x: Ptr,
    w: Ptr,
    bias: Option<Ptr>,
    out: PtrMut,
) {
    let threads = p.threads;
    let work = work(p.offsets);
    let used = p.offsets.last().map_or(0, |&n| n as usize);
    let factor = Factor::weight(w.cast::<E>(), p.inner, p.outer, p.transposed);
    let cols = block_cols::<M, E>(factor, p.outer, &work, threads);
    let blocks = p.outer.div_ceil(cols);
    // SAFETY: as promised by the caller.
    unsafe {
        let rest = out.cast::<E>().add(used * p.outer);
        std::ptr::write_bytes(rest, 0, (p.rows - used) * p.outer);
        let x = PackedRows::pack::<M, E>(Rows::dense(x.cast(), p.inner), used, p.inner, &work, threads);
        let bias = bias.map(<*const u8>::cast::<E>);
        let job = Grouped { p, x: &x, w: w.cast::<E>(), bias, out: out.cast::<E>() };
        threads.for_each(work.len() * blocks, |task| {
            M::begin();
            let start = task % blocks * cols;
            M::call(GroupedTask {
                job: &job,
                work: &work[task / blocks],
                start,
                cols: cols.min(p.outer - start),
            });
            M::end();
        });
    }
}

struct Grouped<'a, M: Machine, E> {
    p: &'a GroupedMm<'a>,
    x: &'a PackedRows<M::Acc>,
    w: *const E,
    bias: Option<*const E>,
    out: *mut E,
}

// SAFETY: tasks write disjoint columns of `out`.
unsafe impl<M: Machine, E> Sync for Grouped<'_, M, E> {}

struct GroupedTask<'a, M: Machine, E> {
    job: &'a Grouped<'a, M, E>,
    work: &'a Work,
    start: usize,
    cols: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for GroupedTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: as promised by the caller.
        unsafe { if self.work.is_few::<M>() { self.run_on::<M::Few>() } else { self.run_on::<M>() } }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> GroupedTask<'_, M, E> {
    #[inline(always)]
    unsafe fn run_on<N: Machine<Acc = M::Acc>>(self) {
        let Self { job, work, start, cols } = self;
        let p = job.p;
        let sums = Scratch::<M::Acc>::new(sums_len::<N>(work.longest_chunk::<N>(cols), 1, cols));
        let w = job.w.wrapping_add(work.expert * p.inner * p.outer);
        let factor = Factor::weight(w, p.inner, p.outer, p.transposed).column(start);
        let mut offset = [M::Acc::ZERO; WIDE_COLS];
        for rows in work.chunks::<N>(cols) {
            let product = Product::<N, E> {
                a: job.x.row(rows.start),
                a_stride: job.x.stride,
                rows: rows.len(),
                inner: p.inner,
                parts: &[factor],
                cols,
                next: None,
                c: sums.ptr(),
            };
            // SAFETY: as promised by the caller of `grouped`; these columns are this task's.
            unsafe {
                product.compute();
                if let Some(bias) = job.bias {
                    let row = bias.add(work.expert * p.outer + start);
                    E::widen::<N::V>(std::slice::from_raw_parts(row, cols), &mut offset[..cols]);
                }
                for (i, r) in rows.enumerate() {
                    let sums = std::slice::from_raw_parts_mut(sums.ptr().add(i * product.c_stride()), cols);
                    for (s, &b) in sums.iter_mut().zip(&offset) {
                        *s += b;
                    }
                    let row = job.out.add(r * p.outer + start);
                    E::narrow::<N::V>(sums, std::slice::from_raw_parts_mut(row, cols));
                }
            }
        }
    }
}

/// `grad_w[e] = grad_out_e^T x_e` (its transpose where `transposed`), `grad_bias[e]` the sum of the rows.
///
/// # Safety
/// As `grouped`.
pub unsafe fn grouped_grad_weight<M: Machine, E: Element<Acc = M::Acc>>(
    p: &GroupedMm<'_>,
    grad_out: Ptr,
    x: Ptr,
    grad_w: (PtrMut, Update),
    grad_bias: Option<PtrMut>,
) {
    let work = work(p.offsets);
    let weights = GradWeight { offsets: p.offsets, work: &work, threads: p.threads };
    let grad_out = Matrix::<M::Acc, E>::Gathered(Rows::dense(grad_out.cast(), p.outer), p.outer);
    let x = Matrix::Gathered(Rows::dense(x.cast(), p.inner), p.inner);
    // SAFETY: as promised by the caller.
    unsafe {
        let (rows, cols) = if p.transposed { (x, grad_out) } else { (grad_out, x) };
        weights.matrix::<M, E>(rows, cols, grad_w);
        if let Some(out) = grad_bias {
            weights.bias::<M, E>(grad_out, None, out.cast());
        }
    }
}
