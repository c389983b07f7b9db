//! An operand of a weight gradient: sorted rows as a tensor has them, or as the pass has packed them.

use crate::dtype::Element;
use crate::layer::PackedRows;
use crate::machine::Machine;
use crate::math::Real;
use crate::pack::{Rows, pack_panels_kn, pack_transposed, unpack_numbers};
use std::ops::Range;

/// A matrix with one row for each sorted row.
#[derive(Clone, Copy)]
pub enum Matrix<'a, F: Real, E> {
    /// Rows of a tensor and their length.
    Gathered(Rows<'a, E>, usize),
    /// Packed rows and their length.
    Packed(&'a PackedRows<F>, usize),
}

// SAFETY: tasks only read it.
unsafe impl<F: Real, E> Sync for Matrix<'_, F, E> {}

impl<'a, F: Real, E: Element<Acc = F>> Matrix<'a, F, E> {
    /// Length of a row.
    pub fn cols(&self) -> usize {
        match *self {
            Self::Gathered(_, cols) | Self::Packed(_, cols) => cols,
        }
    }

    fn cells<M: Machine<Acc = F>>(packed: &PackedRows<F>) -> Rows<'a, M::Cell> {
        Rows::dense(packed.row(0).cast(), packed.stride * M::UNIT)
    }

    /// Packs these columns, from a multiple of `BLOCK` units on, each as a row of A.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the ranges lie within the matrix, and `dst` has room for what is
    /// packed.
    #[inline(always)]
    pub unsafe fn transpose<M: Machine<Acc = F>>(
        &self,
        rows: &Range<usize>,
        cols: &Range<usize>,
        dst: *mut F,
        stride: usize,
    ) {
        let (n, start) = (rows.len(), cols.start);
        // SAFETY: as promised by the caller.
        unsafe {
            match *self {
                Self::Gathered(src, _) => {
                    pack_transposed::<M, E, false>(
                        &src.skip(rows.start).column(start),
                        n,
                        cols.len(),
                        dst,
                        stride,
                    );
                }
                Self::Packed(src, _) => {
                    let src = Self::cells::<M>(src).skip(rows.start).column(start * M::PLANES);
                    pack_transposed::<M, M::Cell, true>(&src, n, cols.len(), dst, stride);
                }
            }
        }
    }

    /// Packs these columns, from a multiple of `BLOCK` units on, as panels of B.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the ranges lie within the matrix, and `dst` has room for what is
    /// packed.
    #[inline(always)]
    pub unsafe fn panels<M: Machine<Acc = F>>(&self, rows: &Range<usize>, cols: &Range<usize>, dst: *mut F) {
        let (n, start) = (rows.len(), cols.start);
        // SAFETY: as promised by the caller.
        unsafe {
            match *self {
                Self::Gathered(src, _) => {
                    pack_panels_kn::<M, E, false>(&src.skip(rows.start).column(start), n, cols.len(), dst);
                }
                Self::Packed(src, _) => {
                    let src = Self::cells::<M>(src).skip(rows.start).column(start * M::PLANES);
                    pack_panels_kn::<M, M::Cell, true>(&src, n, cols.len(), dst);
                }
            }
        }
    }

    /// Row `r` as sums.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the row lies within the matrix, `out` is as long.
    #[inline(always)]
    pub unsafe fn widen<M: Machine<Acc = F>>(&self, r: usize, out: &mut [F]) {
        // SAFETY: as promised by the caller.
        unsafe {
            match *self {
                Self::Gathered(src, cols) => match src.row(r) {
                    Some(row) => E::widen::<M::V>(std::slice::from_raw_parts(row, cols), out),
                    None => out.fill(F::ZERO),
                },
                Self::Packed(src, _) => unpack_numbers::<M>(src.row(r), out),
            }
        }
    }
}
