//! Gradients of weights: `dW_e = A_e^T B_e` over the rows of an expert, each element written, or added to, once.

use crate::dtype::Element;
use crate::gemm::{groups, padded_cols, row_groups};
use crate::layer::Work;
use crate::machine::{Machine, Op, Tile, TileUpdate};
use crate::matrix::Matrix;
use crate::memory::{Scratch, take_unwritten};
use crate::pack::{row_stride, units};
use crate::prefetch::Prefetch;
use crate::problem::PtrMut;
use crate::simd::{Vector, copy_past_caches, fence};
use crate::threads::Threads;
use fastmoe_core::{Float, Update};
use std::ops::Range;

/// Rows and columns of a task's part of dW where it is written.
const TASK_ROWS: usize = 128;
const TASK_COLS: usize = 512;
/// Columns of a task that adds, which has fewer rows then: memory that is read wants to be read in its order.
const ADD_COLS: usize = 8 * TASK_COLS;
/// From this size on dW is written past the caches.
const STREAM_BYTES: usize = 32 << 20;
/// Features that one packing task transposes.
const PACK_COLS: usize = 512;
/// Packed rows of the experts that are computed together, so that they stay in the last cache.
const PACKED_BYTES: usize = 8 << 20;
/// Tasks for each thread, so that threads end together.
const TASKS: usize = 8;

/// The experts whose gradients are wanted.
pub struct GradWeight<'a> {
    /// `[E+1]` first row of each expert.
    pub offsets: &'a [i32],
    /// The experts with rows.
    pub work: &'a [Work],
    /// Worker threads.
    pub threads: Threads,
}

impl GradWeight<'_> {
    fn experts(&self) -> usize {
        self.offsets.len() - 1
    }

    fn rows(&self, expert: usize) -> Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }

    fn work(&self, expert: usize) -> Work {
        Work { expert, rows: self.rows(expert) }
    }

    /// `out[e] = rows_e^T cols_e`, or added to it.
    ///
    /// # Safety
    /// The machine has the instruction set; the matrices are valid for the sorted rows, `out` for all experts in the type
    /// of `update`.
    pub unsafe fn matrix<M: Machine, E: Element<Acc = M::Acc>>(
        &self,
        rows: Matrix<'_, M::Acc, E>,
        cols: Matrix<'_, M::Acc, E>,
        (out, update): (PtrMut, Update),
    ) {
        let (m, n) = (rows.cols(), cols.cols());
        let task = match update {
            // Planes of B are read again for every task.
            Update::Write => (if M::PLANES > 1 { 2 * TASK_ROWS } else { TASK_ROWS }, TASK_COLS),
            _ => {
                let cols = n.clamp(TASK_COLS, ADD_COLS);
                ((TASK_ROWS * TASK_COLS / cols).next_multiple_of(M::ROWS), cols)
            }
        };
        let (task_rows, task_cols) = task;
        let (down, across) = (m.div_ceil(task_rows), n.div_ceil(task_cols));
        let parts = self.parts::<M>(m + padded_cols::<M>(n), down * across);
        let longest = self.work.iter().map(|w| row_stride::<M>(w.rows.len())).max().unwrap_or(0);
        let unwritten = update == Update::Write && take_unwritten(out);
        let job = Outer {
            a: Scratch::new(parts.longest * m + longest * M::ROWS),
            b: Scratch::new(parts.longest * padded_cols::<M>(n)),
            of: self,
            starts: parts.starts,
            rows,
            cols,
            out,
            update,
            task,
            streams: !unwritten && self.experts() * m * n * size_of::<E>() >= STREAM_BYTES,
            unwritten,
        };
        let (left, right) = (m.div_ceil(PACK_COLS), n.div_ceil(PACK_COLS));
        for experts in parts.experts {
            let from = |expert| self.work.partition_point(|work| work.expert < expert);
            let work = &self.work[from(experts.start)..from(experts.end)];
            self.threads.for_each(work.len() * (left + right), |task| {
                let (work, i) = (&work[task / (left + right)], task % (left + right));
                // SAFETY: as promised by the caller; every task packs its own columns.
                unsafe {
                    M::call(PackTask {
                        job: &job,
                        work,
                        left: i < left,
                        index: if i < left { i } else { i - left },
                    })
                }
            });
            self.threads.for_each(experts.len() * down * across, |task| {
                let (expert, i) = (experts.start + task / (down * across), task % (down * across));
                M::begin();
                // SAFETY: as promised by the caller; every task writes its own part of dW.
                unsafe {
                    M::call(OuterTask {
                        job: &job,
                        expert,
                        row: i / across * task_rows,
                        col: i % across * task_cols,
                    })
                }
                M::end();
            });
        }
    }

    /// The experts in parts whose packed rows, `width` numbers each, stay in the cache, with `tasks` an expert.
    fn parts<M: Machine>(&self, width: usize, tasks: usize) -> Parts {
        let most = PACKED_BYTES / size_of::<M::Acc>() / width.max(1);
        let mut parts = Parts { experts: Vec::new(), starts: Vec::new(), longest: 0 };
        let (mut first, mut length) = (0, 0);
        for expert in 0..self.experts() {
            let rows = self.rows(expert).len();
            let more = if rows > 0 { row_stride::<M>(rows) } else { 0 };
            if length + more > most && (expert - first) * tasks >= TASKS * self.threads.0 {
                parts.experts.push(first..expert);
                (first, length) = (expert, 0);
            }
            parts.starts.push(length);
            length += more;
            parts.longest = parts.longest.max(length);
        }
        parts.experts.push(first..self.experts());
        parts
    }

    /// `out[e] = sum of scale[r] * row[r]` over the rows of each expert.
    ///
    /// # Safety
    /// As `matrix`.
    pub unsafe fn bias<M: Machine, E: Element<Acc = M::Acc>>(
        &self,
        rows: Matrix<'_, M::Acc, E>,
        scale: Option<&[M::Acc]>,
        out: *mut E,
    ) {
        let job = Bias { of: self, rows, scale, out };
        self.threads.for_each(self.experts(), |expert| {
            // SAFETY: as promised by the caller; every task writes its own expert's row.
            unsafe { M::call(BiasTask { job: &job, expert }) }
        });
    }
}

/// Experts that are packed and computed together.
struct Parts {
    experts: Vec<Range<usize>>,
    /// `[E]` where the packed rows of each expert start in those of its part, in units of the contraction.
    starts: Vec<usize>,
    /// The most units of a part.
    longest: usize,
}

struct Outer<'a, M: Machine, E> {
    of: &'a GradWeight<'a>,
    starts: Vec<usize>,
    rows: Matrix<'a, M::Acc, E>,
    cols: Matrix<'a, M::Acc, E>,
    a: Scratch<M::Acc>,
    b: Scratch<M::Acc>,
    out: PtrMut,
    update: Update,
    /// Rows and columns of a task's part of dW.
    task: (usize, usize),
    /// dW is larger than the caches: it goes past them, but for pages which the system brings there when it maps them.
    streams: bool,
    /// dW is all zeros.
    unwritten: bool,
}

// SAFETY: tasks write disjoint parts of `a`, `b` and `out`.
unsafe impl<M: Machine, E> Sync for Outer<'_, M, E> {}

impl<M: Machine, E: Element<Acc = M::Acc>> Outer<'_, M, E> {
    /// Row `c` of an expert's packed A, and the distance to the next.
    #[inline(always)]
    fn a<N: Machine>(&self, expert: usize, c: usize) -> (*mut M::Acc, usize) {
        let stride = row_stride::<N>(self.of.rows(expert).len());
        (self.a.ptr().wrapping_add(self.starts[expert] * self.rows.cols() + c * stride), stride)
    }

    /// Panel of an expert's packed B that starts with column `c`.
    #[inline(always)]
    fn b<N: Machine>(&self, expert: usize, c: usize) -> *mut M::Acc {
        let units = units::<N>(self.of.rows(expert).len());
        self.b
            .ptr()
            .wrapping_add(self.starts[expert] * padded_cols::<M>(self.cols.cols()) + c * units * N::PLANES)
    }
}

struct PackTask<'a, M: Machine, E> {
    job: &'a Outer<'a, M, E>,
    work: &'a Work,
    left: bool,
    index: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for PackTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: as promised by the caller.
        unsafe { if self.work.is_few::<M>() { self.run_on::<M::Few>() } else { self.run_on::<M>() } }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> PackTask<'_, M, E> {
    #[inline(always)]
    unsafe fn run_on<N: Machine<Acc = M::Acc>>(self) {
        let Self { job, work, left, index } = self;
        let side = if left { &job.rows } else { &job.cols };
        let cols = index * PACK_COLS..side.cols().min((index + 1) * PACK_COLS);
        // SAFETY: as promised by the caller of `matrix`.
        unsafe {
            if left {
                let (dst, stride) = job.a::<N>(work.expert, cols.start);
                side.transpose::<N>(&work.rows, &cols, dst, stride);
            } else {
                side.panels::<N>(&work.rows, &cols, job.b::<N>(work.expert, cols.start));
            }
        }
    }
}

struct OuterTask<'a, M: Machine, E> {
    job: &'a Outer<'a, M, E>,
    expert: usize,
    row: usize,
    col: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for OuterTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let few = self.job.of.work(self.expert).is_few::<M>();
        // SAFETY: as promised by the caller.
        unsafe { if few { self.run_on::<M::Few>() } else { self.run_on::<M>() } }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> OuterTask<'_, M, E> {
    #[inline(always)]
    unsafe fn run_on<N: Machine<Acc = M::Acc>>(self) {
        let Self { job, expert, row, col } = self;
        let (m, n) = (job.rows.cols(), job.cols.cols());
        let (rows, cols) = (job.task.0.min(m - row), job.task.1.min(n - col));
        let first = (expert * m + row) * n + col;
        // SAFETY: the rows lie in this task's part of dW, which has this type unless sums are added to it.
        let out_row = |r: usize| unsafe { row_mut::<E>(job.out, first + r * n, cols) };
        let streams = job.streams && job.update == Update::Write;
        if job.of.rows(expert).is_empty() {
            if job.unwritten {
                return;
            }
            if streams {
                let zeros = [E::default(); TASK_COLS];
                for r in 0..rows {
                    // SAFETY: the row is this task's.
                    unsafe { copy_past_caches::<N::V, E>(&zeros[..cols], out_row(r)) };
                }
                fence();
            } else if job.update == Update::Write {
                (0..rows).for_each(|r| out_row(r).fill(E::default()));
            }
            return;
        }
        // A few rows at a time, whose sums go on to memory from the nearest cache; with planes B is too large to be read again
        // for each few.
        let stride = padded_cols::<N>(cols);
        let at_once = if N::PLANES > 1 { rows.next_multiple_of(N::ROWS) } else { N::ROWS };
        let sums = Scratch::<M::Acc>::new(at_once * stride);
        let (a, a_stride) = job.a::<N>(expert, row);
        let all = job.of.rows(expert).len().div_ceil(N::UNIT);
        let mut wide = [M::Acc::ZERO; TASK_COLS];
        let mut old = match job.update {
            Update::Write => Prefetch::NONE,
            update => {
                let size = if update == Update::Add { size_of::<E>() } else { size_of::<M::Acc>() };
                let steps = rows.div_ceil(N::ROWS) * all.div_ceil(N::DEPTH) * (stride / N::COLS);
                Prefetch::new(job.out.wrapping_add(first * size), rows, cols * size, n * size, steps)
            }
        };
        let mut nothing = Prefetch::NONE;
        // Sums that are complete at once, and of dW's type or rounded to it in registers, need not pass through the cache.
        let size = size_of::<N::V>();
        let direct = streams
            && !N::WHOLE_TILES
            && N::ends_in(E::STREAM)
            && all <= N::DEPTH
            && cols.is_multiple_of(N::COLS)
            && job.out.addr().is_multiple_of(size)
            && (n * size_of::<E>()).is_multiple_of(size);
        let update = if direct { E::STREAM } else { TileUpdate::Write };
        for (from, to) in groups::<N>(rows, at_once) {
            for k in (0..all).step_by(N::DEPTH) {
                for (start, end) in row_groups::<N>(to - from) {
                    for panel in (0..stride).step_by(N::COLS) {
                        old.step();
                        let (row, at) = (from + start, start * stride + panel);
                        // SAFETY: as promised by the caller of `matrix`; both operands are packed.
                        unsafe {
                            N::tile(Tile {
                                a: a.add(row * a_stride + k * N::PLANES),
                                a_stride,
                                rows: end - start,
                                cols: N::COLS,
                                b: job.b::<N>(expert, col + panel).add(k * N::PLANES * N::COLS),
                                units: N::DEPTH.min(all - k),
                                c: if direct {
                                    job.out.cast::<E>().add(first + row * n + panel).cast()
                                } else {
                                    sums.ptr().add(at)
                                },
                                c_stride: if direct { n } else { stride },
                                update: if k > 0 { TileUpdate::Add } else { update },
                                ahead: &mut nothing,
                            });
                        }
                    }
                }
            }
            if direct {
                continue;
            }
            for r in from..to {
                let sums = &sums[(r - from) * stride..][..cols];
                // SAFETY: as promised by the caller; the row is this task's, in the type of sums where these are added wide.
                unsafe {
                    match job.update {
                        Update::Write => write::<N, E>(sums, out_row(r), streams),
                        Update::Add => {
                            for (sums, out) in sums.chunks(TASK_COLS).zip(out_row(r).chunks_mut(TASK_COLS)) {
                                let wide = &mut wide[..sums.len()];
                                E::widen::<N::V>(out, wide);
                                add(sums, wide);
                                E::narrow::<N::V>(wide, out);
                            }
                        }
                        Update::AddWide => add(sums, row_mut(job.out, first + r * n, cols)),
                    }
                }
            }
        }
        fence();
    }
}

/// Writes sums as a row of dW, past the caches where it `streams`; bf16 that is too small for a normal number may become zero.
///
/// # Safety
/// Reached only from code compiled for the machine; both slices have one length, at most `TASK_COLS`.
#[inline(always)]
unsafe fn write<M: Machine, E: Element<Acc = M::Acc>>(sums: &[M::Acc], out: &mut [E], streams: bool) {
    let lanes = M::V::LANES;
    let streams = streams && out.as_ptr().addr().is_multiple_of(size_of::<M::V>());
    let whole = if E::WIDE || !M::ends_in(E::STREAM) { 0 } else { sums.len() / (2 * lanes) * 2 * lanes };
    // SAFETY: as promised by the caller; a register of numbers to be written is made of two of sums.
    unsafe {
        for i in (0..whole).step_by(2 * lanes) {
            let pair = [M::V::load(sums.as_ptr().add(i)), M::V::load(sums.as_ptr().add(i + lanes))];
            let rounded = match E::STREAM {
                TileUpdate::StreamBf16 => M::V::round_to_bf16(pair),
                _ => M::V::round_to_f16(pair),
            };
            let to = out.as_mut_ptr().add(i).cast();
            if streams { rounded.store_past_caches(to) } else { rounded.store(to) }
        }
        let (sums, out) = (&sums[whole..], &mut out[whole..]);
        if streams && E::WIDE {
            let out = std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<M::Acc>(), out.len());
            copy_past_caches::<M::V, M::Acc>(sums, out);
        } else if streams && whole == 0 {
            let mut rounded = [E::default(); TASK_COLS];
            E::narrow::<M::V>(sums, &mut rounded[..sums.len()]);
            copy_past_caches::<M::V, E>(&rounded[..sums.len()], out);
        } else {
            E::narrow::<M::V>(sums, out);
        }
    }
}

#[inline(always)]
fn add<F: Float>(numbers: &[F], to: &mut [F]) {
    for (t, &x) in to.iter_mut().zip(numbers) {
        *t += x;
    }
}

/// `len` numbers of a tensor.
///
/// # Safety
/// The tensor has them, and nothing else refers to them.
#[inline(always)]
unsafe fn row_mut<'a, T>(tensor: PtrMut, first: usize, len: usize) -> &'a mut [T] {
    // SAFETY: as promised by the caller.
    unsafe { std::slice::from_raw_parts_mut(tensor.cast::<T>().add(first), len) }
}

struct Bias<'a, M: Machine, E> {
    of: &'a GradWeight<'a>,
    rows: Matrix<'a, M::Acc, E>,
    scale: Option<&'a [M::Acc]>,
    out: *mut E,
}

// SAFETY: tasks write disjoint rows of `out`.
unsafe impl<M: Machine, E> Sync for Bias<'_, M, E> {}

struct BiasTask<'a, M: Machine, E> {
    job: &'a Bias<'a, M, E>,
    expert: usize,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for BiasTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let Bias { of, rows, scale, out } = *self.job;
        let cols = rows.cols();
        let mut total = vec![M::Acc::ZERO; cols];
        let mut row = total.clone();
        let few = of.work(self.expert).is_few::<M>();
        for r in of.rows(self.expert) {
            // SAFETY: as promised by the caller of `bias`.
            unsafe {
                if few {
                    rows.widen::<M::Few>(r, &mut row);
                } else {
                    rows.widen::<M>(r, &mut row);
                }
            }
            let scale = scale.map_or(M::Acc::ONE, |s| s[r]);
            for (t, &x) in total.iter_mut().zip(&row) {
                *t += x * scale;
            }
        }
        // SAFETY: as promised by the caller; this row of `out` is this task's.
        unsafe {
            E::narrow::<M::V>(&total, std::slice::from_raw_parts_mut(out.add(self.expert * cols), cols));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::work;
    use crate::machine::Portable;

    #[test]
    fn experts_are_packed_in_parts_that_fit() {
        let offsets = [0, 0, 400, 800, 800, 900, 3000, 3001];
        let work = work(&offsets);
        let (width, tasks) = (4096, 16);
        let parts = |threads| {
            let threads = Threads::new(threads);
            GradWeight { offsets: &offsets, work: &work, threads }.parts::<Portable>(width, tasks)
        };
        let some = parts(2);
        assert_eq!(some.experts, [0..2, 2..5, 5..6, 6..7]);
        assert_eq!(some.starts, [0, 0, 0, 400, 400, 0, 0]);
        assert_eq!(some.longest, row_stride::<Portable>(2100));
        let all = parts(64);
        assert_eq!(all.experts.len(), 1, "smaller parts would leave threads idle");
        assert!(all.longest > 3000);
    }
}
