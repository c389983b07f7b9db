//! Few rows of A: inner products with the rows of W where they lie, for packing them would cost more.
//!
//! Rows of A go in groups, a few rows of W at a time, so that all sums of both stay in registers and whatever is
//! loaded of the one serves several of the other.

use crate::dtype::Element;
use crate::machine::{Machine, multiply_add};
use crate::pack::{Rows, load, load_some};
use crate::simd::{Vector, prefetch_l2};

/// Most rows of A in a group.
const GROUP: usize = 6;
/// Bytes of A that the first cache keeps while W streams by.
const A_IN_L1: usize = 8 << 10;
/// How far ahead a single row of W is asked for, in bytes.
const AHEAD: usize = 3072;

/// `C[rows, cols] = A[rows, inner] W[cols, inner]^T`.
pub struct Dots<'a, M: Machine, E> {
    /// Packed rows of A.
    pub a: *const M::Acc,
    /// Units from one row of A to the next.
    pub a_stride: usize,
    /// Rows of A and C, at least one.
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
        let groups = self.rows.div_ceil(GROUP);
        // Memory gives one stream of W faster than four, but then all of A is loaded for every row of W: where A is as
        // narrow as W that is the smaller cost.
        let narrow = M::UNIT > 1 && self.a_stride * size_of::<M::Acc>() <= A_IN_L1;
        let together = match (self.rows, M::MANY_REGISTERS) {
            (1, true) if narrow => 1,
            (_, true) => 4,
            (_, false) => 2,
        };
        let mut column = 0;
        while column < self.cols {
            let n = if column + together <= self.cols { together } else { 1 };
            for g in 0..groups {
                let (start, end) = (self.rows * g / groups, self.rows * (g + 1) / groups);
                // SAFETY: as promised by the caller.
                unsafe { self.group(start, end - start, column, n) }
            }
            column += n;
        }
    }

    #[inline(always)]
    unsafe fn group(&self, start: usize, rows: usize, column: usize, columns: usize) {
        macro_rules! sizes {
            ($($n:literal)*) => {
                match (rows, columns) {
                    $(
                        ($n, 1) => self.some::<$n, 1>(start, column),
                        ($n, 2) => self.some::<$n, 2>(start, column),
                        ($n, 4) if M::MANY_REGISTERS => self.some::<$n, 4>(start, column),
                    )*
                    _ => unreachable!("{rows} rows by {columns}"),
                }
            };
        }
        // SAFETY: as promised by the caller of `compute`.
        unsafe { sizes!(1 2 3 4 5 6) }
    }

    /// The rows `start..start + R` of A with the rows `column..column + J` of W.
    #[inline(always)]
    unsafe fn some<const R: usize, const J: usize>(&self, start: usize, column: usize) {
        let step = M::V::LANES * M::UNIT;
        let (whole, mut from) = (self.inner / step * step, 0);
        let w = |q: usize| self.w.start.wrapping_add((column + q) * self.w.stride);
        let ahead = if J == 1 { AHEAD } else { J * self.w.stride * size_of::<E>() };
        // SAFETY: as promised by the caller of `compute`; A is padded to whole registers.
        unsafe {
            let mut sums = [[M::V::zero(); J]; R];
            if R * J <= 4 {
                // More sums than results, for an addition takes longer than it takes to begin the next.
                let mut others = [[M::V::zero(); J]; R];
                while from + 2 * step <= whole {
                    self.add::<R, J>(start, from, w, ahead, &mut sums);
                    self.add::<R, J>(start, from + step, w, ahead, &mut others);
                    from += 2 * step;
                }
                for r in 0..R {
                    for q in 0..J {
                        sums[r][q] = sums[r][q].add(others[r][q]);
                    }
                }
            }
            while from < whole {
                self.add::<R, J>(start, from, w, ahead, &mut sums);
                from += step;
            }
            if from < self.inner {
                let mut rest = [M::V::zero(); J];
                for q in 0..J {
                    rest[q] = load_some::<M, E>(w(q).add(from), self.inner - from);
                }
                self.multiply::<R, J>(start, from, &rest, &mut sums);
            }
            // The sums leave their registers here: what follows is too long to be unrolled around them.
            let mut done = [[M::V::zero(); J]; R];
            for r in 0..R {
                for q in 0..J {
                    done[r][q] = sums[r][q];
                }
            }
            for (r, sums) in done.iter().enumerate() {
                let c = self.c.add((start + r) * self.c_stride + column);
                if let Ok(&four) = <&[M::V; 4]>::try_from(&sums[..]) {
                    c.cast::<[M::Acc; 4]>().write_unaligned(M::V::sum_four(four));
                } else {
                    for (q, v) in sums.iter().enumerate() {
                        *c.add(q) = v.sum();
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add<const R: usize, const J: usize>(
        &self,
        start: usize,
        from: usize,
        row: impl Fn(usize) -> *const E,
        ahead: usize,
        sums: &mut [[M::V; J]; R],
    ) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            let mut w = [M::V::zero(); J];
            for q in 0..J {
                let p = row(q).add(from);
                prefetch_l2(p.cast::<u8>().wrapping_add(ahead));
                w[q] = load::<M, E>(p);
            }
            self.multiply::<R, J>(start, from, &w, sums);
        }
    }

    #[inline(always)]
    unsafe fn multiply<const R: usize, const J: usize>(
        &self,
        start: usize,
        from: usize,
        w: &[M::V; J],
        sums: &mut [[M::V; J]; R],
    ) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            for r in 0..R {
                let a = M::V::load(self.a.add((start + r) * self.a_stride + from / M::UNIT));
                for q in 0..J {
                    sums[r][q] = multiply_add::<M>(sums[r][q], w[q], a);
                }
            }
        }
    }
}
