//! Moving rows between token order and expert order.

use crate::dtype::Element;
use crate::machine::{Machine, Op};
use crate::math::dot;
use crate::problem::{Ptr, PtrMut};
use crate::threads::Threads;
use fastmoe_core::Float;
use std::marker::PhantomData;
use std::ops::Range;

const AT_ONCE: usize = 64;

/// A tensor's rows; tasks write disjoint ones.
#[derive(Clone, Copy)]
struct Table<E> {
    start: *mut E,
    cols: usize,
}

// SAFETY: inputs are only read, and every task writes its own rows of an output.
unsafe impl<E> Sync for Table<E> {}

impl<E> Table<E> {
    fn input(p: Ptr, cols: usize) -> Self {
        Self { start: p.cast::<E>().cast_mut(), cols }
    }

    fn output(p: PtrMut, cols: usize) -> Self {
        Self { start: p.cast(), cols }
    }

    /// # Safety
    /// The row exists, and nothing writes it for as long as it is borrowed.
    #[inline(always)]
    unsafe fn row<'a>(&self, r: usize) -> &'a [E] {
        // SAFETY: as promised by the caller; any bits are a number.
        unsafe { std::slice::from_raw_parts(self.start.add(r * self.cols), self.cols) }
    }

    /// # Safety
    /// The row exists, and the caller's task alone reads or writes it for as long as it is borrowed.
    #[inline(always)]
    unsafe fn row_mut<'a>(&self, r: usize) -> &'a mut [E] {
        // SAFETY: as promised by the caller; any bits are a number.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(r * self.cols), self.cols) }
    }
}

fn ranges(threads: Threads, rows: usize, task: impl Fn(Range<usize>) + Sync) {
    threads.for_each(rows.div_ceil(AT_ONCE), |i| task(i * AT_ONCE..rows.min((i + 1) * AT_ONCE)));
}

/// `out[r] = x[gather[r]]`, zeros where -1.
///
/// # Safety
/// `x` has the rows that `gather` names, `out` one for each of its entries, and `out` overlaps nothing.
pub unsafe fn permute(size: usize, cols: usize, x: Ptr, gather: &[i32], out: PtrMut, threads: Threads) {
    let (x, out) = (Table::<u8>::input(x, cols * size), Table::<u8>::output(out, cols * size));
    ranges(threads, gather.len(), |rows| {
        let (x, out) = (&x, &out);
        for r in rows {
            // SAFETY: as promised by the caller; row r is this task's.
            unsafe {
                match usize::try_from(gather[r]) {
                    Ok(token) => out.row_mut(r).copy_from_slice(x.row(token)),
                    Err(_) => out.row_mut(r).fill(0),
                }
            }
        }
    });
}

/// Operands of `unpermute` and of its gradients.
pub struct Unpermute<'a> {
    /// Columns of a row.
    pub cols: usize,
    /// K.
    pub top_k: usize,
    /// Sorted rows.
    pub y: Ptr,
    /// `[T*K]`.
    pub inverse: &'a [i32],
    /// `[T, K]`, ones where `None`.
    pub weights: Option<Ptr>,
    /// Worker threads to use at most.
    pub threads: Threads,
}

/// `out[t] = sum_k weights[t,k] y[inverse[t,k]]`.
///
/// # Safety
/// The machine has the instruction set; the pointers are valid for the sizes.
pub unsafe fn unpermute<M: Machine, E: Element<Acc = M::Acc>>(p: &Unpermute<'_>, out: PtrMut) {
    let job = Sum {
        y: Table::<E>::input(p.y, p.cols),
        out: Table::<E>::output(out, p.cols),
        inverse: p.inverse,
        top_k: p.top_k,
        weights: p.weights.map(|w| Table::<M::Acc>::input(w, p.top_k)),
    };
    ranges(p.threads, p.inverse.len() / p.top_k, |tokens| {
        // SAFETY: as promised by the caller.
        unsafe { M::call(SumTask::<M, E> { job: &job, tokens, machine: PhantomData }) }
    });
}

struct Sum<'a, E, F> {
    y: Table<E>,
    out: Table<E>,
    inverse: &'a [i32],
    top_k: usize,
    weights: Option<Table<F>>,
}

struct SumTask<'a, M: Machine, E> {
    job: &'a Sum<'a, E, M::Acc>,
    tokens: Range<usize>,
    machine: PhantomData<M>,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for SumTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let job = self.job;
        let mut total = vec![M::Acc::ZERO; job.out.cols];
        let mut row = total.clone();
        for t in self.tokens {
            total.fill(M::Acc::ZERO);
            for k in 0..job.top_k {
                let Ok(r) = usize::try_from(job.inverse[t * job.top_k + k]) else { continue };
                // SAFETY: as promised by the caller of `unpermute`.
                unsafe {
                    let scale = job.weights.map_or(M::Acc::ONE, |w| w.row(t)[k]);
                    E::widen::<M::V>(job.y.row(r), &mut row);
                    for (t, &y) in total.iter_mut().zip(&row) {
                        *t += scale * y;
                    }
                }
            }
            // SAFETY: as promised by the caller of `unpermute`; token t is this task's.
            unsafe { E::narrow::<M::V>(&total, job.out.row_mut(t)) };
        }
    }
}

/// `grad_y[inverse[t,k]] = weights[t,k] grad_out[t]` (zeros in unused rows), `grad_weights[t,k] = <grad_out[t], y>`.
///
/// # Safety
/// As `unpermute`; `grad_y` has a row for each entry of `gather`.
pub unsafe fn unpermute_backward<M: Machine, E: Element<Acc = M::Acc>>(
    p: &Unpermute<'_>,
    grad_out: Ptr,
    gather: &[i32],
    grad_y: Option<PtrMut>,
    grad_weights: Option<PtrMut>,
) {
    let job = Spread {
        y: Table::<E>::input(p.y, p.cols),
        grad_out: Table::<E>::input(grad_out, p.cols),
        inverse: p.inverse,
        top_k: p.top_k,
        weights: p.weights.map(|w| Table::<M::Acc>::input(w, p.top_k)),
        grad_y: grad_y.map(|g| Table::<E>::output(g, p.cols)),
        grad_weights: grad_weights.map(|g| Table::<M::Acc>::output(g, p.top_k)),
    };
    if let Some(grad_y) = &job.grad_y {
        let mut used = vec![false; gather.len()];
        p.inverse.iter().filter_map(|&r| usize::try_from(r).ok()).for_each(|r| used[r] = true);
        for r in (0..gather.len()).filter(|&r| !used[r]) {
            // SAFETY: as promised by the caller.
            unsafe { grad_y.row_mut(r).fill(E::default()) };
        }
    }
    ranges(p.threads, p.inverse.len() / p.top_k, |tokens| {
        // SAFETY: as promised by the caller.
        unsafe { M::call(SpreadTask::<M, E> { job: &job, tokens, machine: PhantomData }) }
    });
}

struct Spread<'a, E, F> {
    y: Table<E>,
    grad_out: Table<E>,
    inverse: &'a [i32],
    top_k: usize,
    weights: Option<Table<F>>,
    grad_y: Option<Table<E>>,
    grad_weights: Option<Table<F>>,
}

struct SpreadTask<'a, M: Machine, E> {
    job: &'a Spread<'a, E, M::Acc>,
    tokens: Range<usize>,
    machine: PhantomData<M>,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for SpreadTask<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        let job = self.job;
        let [mut grad, mut row] = [(); 2].map(|()| vec![M::Acc::ZERO; job.grad_out.cols]);
        for t in self.tokens {
            // SAFETY: as promised by the caller of `unpermute_backward`; a sorted row belongs to one token.
            unsafe {
                E::widen::<M::V>(job.grad_out.row(t), &mut grad);
                for k in 0..job.top_k {
                    let r = usize::try_from(job.inverse[t * job.top_k + k]).ok();
                    if let Some(grad_weights) = job.grad_weights {
                        grad_weights.row_mut(t)[k] = r.map_or(M::Acc::ZERO, |r| {
                            E::widen::<M::V>(job.y.row(r), &mut row);
                            dot(&grad, &row)
                        });
                    }
                    if let (Some(r), Some(grad_y)) = (r, job.grad_y) {
                        let scale = job.weights.map_or(M::Acc::ONE, |w| w.row(t)[k]);
                        for (y, &g) in row.iter_mut().zip(&grad) {
                            *y = scale * g;
                        }
                        E::narrow::<M::V>(&row, grad_y.row_mut(r));
                    }
                }
            }
        }
    }
}
