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

/// Rows of W, each with its contraction contiguous.
pub trait Columns<M: Machine> {
    /// Where a row begins.
    type Row: Copy;
    /// Rows are best read one after the other, where A allows it.
    const ONE_STREAM: bool;
    /// Row `i`.
    fn row(&self, i: usize) -> Self::Row;
    /// One register of units, from number `from` of a row on.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the row has these numbers.
    unsafe fn load(&self, row: Self::Row, from: usize) -> M::V;
    /// As `load`, of `n` numbers, zeros after them.
    ///
    /// # Safety
    /// As `load`.
    unsafe fn load_some(&self, row: Self::Row, from: usize, n: usize) -> M::V;
    /// Asks for what is read soon after that, where so many rows are read together.
    fn prefetch(&self, row: Self::Row, from: usize, together: usize);
}

impl<M: Machine, E: Element> Columns<M> for Rows<'_, E> {
    type Row = *const E;
    const ONE_STREAM: bool = M::PAIRS;
    #[inline(always)]
    fn row(&self, i: usize) -> *const E {
        self.start.wrapping_add(i * self.stride)
    }
    #[inline(always)]
    unsafe fn load(&self, row: *const E, from: usize) -> M::V {
        // SAFETY: as promised by the caller.
        unsafe { load::<M, E>(row.add(from)) }
    }
    #[inline(always)]
    unsafe fn load_some(&self, row: *const E, from: usize, n: usize) -> M::V {
        // SAFETY: as promised by the caller.
        unsafe { load_some::<M, E>(row.add(from), n) }
    }
    #[inline(always)]
    fn prefetch(&self, row: *const E, from: usize, together: usize) {
        let p = row.wrapping_add(from).cast::<u8>();
        let ahead = if together == 1 { AHEAD } else { together * self.stride * size_of::<E>() };
        prefetch_l2(p.wrapping_add(ahead))
    }
}

/// `C[rows, cols] = A[rows, inner] W[cols, inner]^T`.
pub struct Dots<M: Machine, W> {
    /// Packed rows of A.
    pub a: *const M::Acc,
    /// Units from one row of A to the next.
    pub a_stride: usize,
    /// Rows of A and C, at least one.
    pub rows: usize,
    /// The rows of W.
    pub w: W,
    /// Length of the contraction, in numbers.
    pub inner: usize,
    /// Rows of W.
    pub cols: usize,
    /// Sums.
    pub c: *mut M::Acc,
    /// Numbers from one row of C to the next.
    pub c_stride: usize,
}

impl<M: Machine, W: Columns<M>> Dots<M, W> {
    /// Computes C.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the pointers are valid for the sizes.
    #[inline(always)]
    pub unsafe fn compute(&self) {
        let groups = self.rows.div_ceil(GROUP);
        let together = if M::MANY_REGISTERS { 4 } else { 2 };
        // Memory gives one stream of W faster than four, but then all of A is loaded for every row of W: where A is as
        // narrow as W that is the smaller cost.
        let one_stream = W::ONE_STREAM && self.rows == 1 && self.a_stride * size_of::<M::Acc>() <= A_IN_L1;
        let mut column = 0;
        while column < self.cols {
            let n = if column + together <= self.cols { together } else { 1 };
            if one_stream && n == 4 {
                // SAFETY: as promised by the caller.
                unsafe { self.one_after_the_other(column) }
                column += n;
                continue;
            }
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

    /// The only row of A with four rows of W, with the very sums of `some`.
    #[inline(always)]
    unsafe fn one_after_the_other(&self, column: usize) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            let mut sums = [[M::V::zero(); 4]];
            for q in 0..4 {
                sums[0][q] = self.sums::<1, 1>(0, column + q)[0][0];
            }
            self.store(0, column, &sums);
        }
    }

    /// The rows `start..start + R` of A with the rows `column..column + J` of W.
    #[inline(always)]
    unsafe fn some<const R: usize, const J: usize>(&self, start: usize, column: usize) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            let sums = self.sums::<R, J>(start, column);
            // The sums leave their registers here: what follows is too long to be unrolled around them.
            let mut done = [[M::V::zero(); J]; R];
            for r in 0..R {
                for q in 0..J {
                    done[r][q] = sums[r][q];
                }
            }
            self.store(start, column, &done);
        }
    }

    /// The sums of each lane.
    #[inline(always)]
    unsafe fn sums<const R: usize, const J: usize>(&self, start: usize, column: usize) -> [[M::V; J]; R] {
        let step = M::V::LANES * M::UNIT;
        let (whole, mut from) = (self.inner / step * step, 0);
        let w: [W::Row; J] = std::array::from_fn(|q| self.w.row(column + q));
        // SAFETY: as promised by the caller of `compute`; A is padded to whole registers.
        unsafe {
            let mut sums = [[M::V::zero(); J]; R];
            if R * J <= 4 {
                // More sums than results, for an addition takes longer than it takes to begin the next.
                let mut others = [[M::V::zero(); J]; R];
                while from + 2 * step <= whole {
                    self.add::<R, J>(start, from, &w, &mut sums);
                    self.add::<R, J>(start, from + step, &w, &mut others);
                    from += 2 * step;
                }
                for r in 0..R {
                    for q in 0..J {
                        sums[r][q] = sums[r][q].add(others[r][q]);
                    }
                }
            }
            while from < whole {
                self.add::<R, J>(start, from, &w, &mut sums);
                from += step;
            }
            if from < self.inner {
                let mut rest = [M::V::zero(); J];
                for q in 0..J {
                    rest[q] = self.w.load_some(w[q], from, self.inner - from);
                }
                self.multiply::<R, J>(start, from, &rest, &mut sums);
            }
            sums
        }
    }

    /// Adds up the lanes.
    #[inline(always)]
    unsafe fn store<const R: usize, const J: usize>(
        &self,
        start: usize,
        column: usize,
        sums: &[[M::V; J]; R],
    ) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            for (r, sums) in sums.iter().enumerate() {
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
        rows: &[W::Row; J],
        sums: &mut [[M::V; J]; R],
    ) {
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            let mut w = [M::V::zero(); J];
            for q in 0..J {
                self.w.prefetch(rows[q], from, J);
                w[q] = self.w.load(rows[q], from);
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
