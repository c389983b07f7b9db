//! Few rows of A: sums of rows of B, scaled by A, from where they lie, for packing them would cost more.

use crate::dtype::Element;
use crate::gemm::row_groups;
use crate::machine::{BLOCK, Machine, Op, multiply_add};
use crate::pack::{Rows, load};
use crate::prefetch::Prefetch;
use crate::row_pointers::RowPointers;
use crate::simd::Vector;

/// Up to so many tiles of rows, packing takes longer than reading B in place again for each (measured).
pub const FEW_TILES: usize = 2;

/// `C[rows, cols] (+)= A[rows, units] B[units, cols]`.
pub struct ScaledRows<'a, 'b, M: Machine, E> {
    /// Packed rows of A.
    pub a: *const M::Acc,
    /// Units from one row of A to the next.
    pub a_stride: usize,
    /// Rows of A and C.
    pub rows: usize,
    /// Rows of B along the contraction, one or two to a unit.
    pub b: Rows<'a, E>,
    /// Length of the contraction, in whole units.
    pub units: usize,
    /// Columns, a multiple of `Machine::COLS`.
    pub cols: usize,
    /// Sums.
    pub c: *mut M::Acc,
    /// Numbers from one row of C to the next.
    pub c_stride: usize,
    /// Adds to C instead of writing it.
    pub accumulate: bool,
    /// Memory that will be wanted soon.
    pub ahead: &'b mut Prefetch,
}

impl<M: Machine, E: Element<Acc = M::Acc>> Op<M> for ScaledRows<'_, '_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(mut self) {
        macro_rules! tile {
            ($start:ident, $end:ident, $column:ident, $($rows:literal)*) => {
                match ($end - $start, M::ACROSS) {
                    $(
                        ($rows, 1) if $rows <= M::ROWS => self.tile::<$rows, 1>($start, $column),
                        ($rows, 2) if $rows <= M::ROWS => self.tile::<$rows, 2>($start, $column),
                        ($rows, _) if $rows <= M::ROWS => self.tile::<$rows, 4>($start, $column),
                    )*
                    (n, _) => unreachable!("{n} rows in a tile of {}", M::ROWS),
                }
            };
        }
        for column in (0..self.cols).step_by(M::COLS) {
            for (start, end) in row_groups::<M>(self.rows) {
                // SAFETY: as promised by the caller of `run`.
                unsafe { tile!(start, end, column, 1 2 3 4 5 6 7 8 9 10 11 12) }
            }
        }
    }
}

impl<M: Machine, E: Element<Acc = M::Acc>> ScaledRows<'_, '_, M, E> {
    /// The rows `start..start + R` and `N` registers of columns, all sums in registers.
    #[inline(always)]
    unsafe fn tile<const R: usize, const N: usize>(&mut self, start: usize, column: usize) {
        // SAFETY: as promised by the caller of `run`.
        unsafe {
            let mut sums = [[M::V::zero(); N]; R];
            let mut a = RowPointers::new(self.a.add(start * self.a_stride), self.a_stride, R);
            let mut row = self.b.start.add(column);
            for _ in 0..self.units / BLOCK {
                self.ahead.step();
                for k in 0..BLOCK {
                    self.add_unit::<R, N>(&a, k, row, &mut sums);
                    row = row.wrapping_add(M::UNIT * self.b.stride);
                }
                a.advance(BLOCK);
            }
            for k in 0..self.units % BLOCK {
                self.add_unit::<R, N>(&a, k, row, &mut sums);
                row = row.wrapping_add(M::UNIT * self.b.stride);
            }
            for r in 0..R {
                for n in 0..N {
                    let c = self.c.add((start + r) * self.c_stride + column + n * M::V::LANES);
                    let sum = if self.accumulate { M::V::load(c).add(sums[r][n]) } else { sums[r][n] };
                    sum.store(c);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn add_unit<const R: usize, const N: usize>(
        &self,
        a: &RowPointers<M::Acc>,
        k: usize,
        row: *const E,
        sums: &mut [[M::V; N]; R],
    ) {
        // SAFETY: as promised by the caller of `run`.
        unsafe {
            let mut b = [M::V::zero(); N];
            for n in 0..N {
                let p = row.add(n * M::V::LANES);
                b[n] =
                    if M::PAIRS { M::V::zip(p.cast(), p.add(self.b.stride).cast()) } else { load::<M, E>(p) };
            }
            for r in 0..R {
                let a = M::V::splat(a.at(r, k));
                for n in 0..N {
                    sums[r][n] = multiply_add::<M>(sums[r][n], a, b[n]);
                }
            }
        }
    }
}
