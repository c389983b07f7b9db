//! Few rows of A: inner products with the rows of W where they lie, for packing them would cost more.

use crate::dtype::Element;
use crate::machine::{Machine, multiply_add};
use crate::pack::{Rows, load, load_some};
use crate::simd::{Vector, prefetch_l1, prefetch_l2};

/// Most rows of A.
pub const FEW_ROWS: usize = 8;
/// How far ahead a single row of W is asked for, in bytes.
const AHEAD: usize = 4096;

/// `C[rows, cols] = A[rows, inner] W[cols, inner]^T`.
pub struct Dots<'a, M: Machine, E> {
    /// Packed rows of A.
    pub a: *const M::Acc,
    /// Units from one row of A to the next.
    pub a_stride: usize,
    /// At most `FEW_ROWS`.
    pub rows: usize,
    /// Rows of W, each with its contraction contiguous.
    pub w: Rows<'a, E>,
    /// Length of the contraction, in numbers.
    pub inner: usize,
    /// Rows of W.
    pub cols: usize,
    /// Sums.
    pub c: *mut M::Acc,
    /// Numbers from one row of C to the next.
    pub c_stride: usize,
}

impl<M: Machine, E: Element> Dots<'_, M, E> {
    /// Computes C.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the pointers are valid for the sizes.
    #[inline(always)]
    pub unsafe fn compute(&self) {
        // Rows of W at a time: as many as keep all sums in registers, for each load of A serves them all.
        // SAFETY: as promised by the caller.
        unsafe {
            match (self.rows, M::MANY_REGISTERS) {
                (1, true) => self.all::<1, 4, 2>(),
                (2, true) => self.all::<2, 4, 1>(),
                (1, false) => self.all::<1, 1, 4>(),
                (2, false) => self.all::<2, 2, 2>(),
                (3, true) => self.all::<3, 4, 1>(),
                (4, true) => self.all::<4, 4, 1>(),
                (3, false) => self.all::<3, 2, 1>(),
                (4, false) => self.all::<4, 2, 1>(),
                (5, true) => self.all::<5, 4, 1>(),
                (6, true) => self.all::<6, 4, 1>(),
                (7, true) => self.all::<7, 3, 1>(),
                (8, true) => self.all::<8, 3, 1>(),
                (5, false) => self.all::<5, 2, 1>(),
                (6, false) => self.all::<6, 2, 1>(),
                (7, false) => self.all::<7, 1, 1>(),
                (8, false) => self.all::<8, 1, 1>(),
                (n, _) => unreachable!("{n} rows are not few"),
            }
        }
    }

    #[inline(always)]
    unsafe fn all<const R: usize, const J: usize, const U: usize>(&self) {
        let together = self.cols / J * J;
        for j in (0..together).step_by(J) {
            // SAFETY: as promised by the caller of `compute`.
            unsafe { self.some::<R, J, U>(j) }
        }
        for j in together..self.cols {
            // SAFETY: as promised by the caller of `compute`.
            unsafe { self.some::<R, 1, U>(j) }
        }
    }

    /// All rows of A with the rows `j..j + J` of W, `U` registers of each at a time.
    #[inline(always)]
    unsafe fn some<const R: usize, const J: usize, const U: usize>(&self, j: usize) {
        let step = M::V::LANES * M::UNIT;
        let row_bytes = self.w.stride * size_of::<E>();
        // SAFETY: as promised by the caller of `compute`; A is padded to whole registers.
        unsafe {
            let mut sums = [[[M::V::zero(); U]; J]; R];
            let mut from = 0;
            while from + U * step <= self.inner {
                for u in 0..U {
                    let at = from + u * step;
                    let mut w = [M::V::zero(); J];
                    for q in 0..J {
                        let p = self.w.start.add((j + q) * self.w.stride + at);
                        if J == 1 {
                            prefetch_l1(p.cast::<u8>().wrapping_add(AHEAD));
                        } else {
                            prefetch_l2(p.cast::<u8>().wrapping_add(J * row_bytes));
                        }
                        w[q] = load::<M, E>(p);
                    }
                    for r in 0..R {
                        let a = M::V::load(self.a.add(r * self.a_stride + at / M::UNIT));
                        for q in 0..J {
                            sums[r][q][u] = multiply_add::<M>(sums[r][q][u], w[q], a);
                        }
                    }
                }
                from += U * step;
            }
            while from < self.inner {
                for q in 0..J {
                    let p = self.w.start.add((j + q) * self.w.stride + from);
                    let w = if from + step <= self.inner {
                        load::<M, E>(p)
                    } else {
                        load_some::<M, E>(p, self.inner - from)
                    };
                    for r in 0..R {
                        let a = M::V::load(self.a.add(r * self.a_stride + from / M::UNIT));
                        sums[r][q][0] = multiply_add::<M>(sums[r][q][0], w, a);
                    }
                }
                from += step;
            }
            for r in 0..R {
                for q in 0..J {
                    let mut total = sums[r][q][0];
                    for u in 1..U {
                        total = total.add(sums[r][q][u]);
                    }
                    *self.c.add(r * self.c_stride + j + q) = total.sum();
                }
            }
        }
    }
}
