//! Packing: operands are laid out for the tile products, widened where the machine multiplies wider numbers.
//!
//! A becomes rows of units `[m][units]`, B panels `[n / COLS][units][COLS]`; both are padded with zeros to a
//! multiple of `BLOCK` units.

use crate::dtype::Element;
use crate::machine::{BLOCK, Machine};
use crate::simd::Vector;

/// Rows of a matrix in memory, one after the other or picked by an index (-1 is a row of zeros).
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    /// First row.
    pub start: *const E,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Which rows, in order; all of them where `None`.
    pub index: Option<&'a [i32]>,
}

impl<'a, E> Rows<'a, E> {
    /// Rows one after the other.
    pub fn dense(start: *const E, stride: usize) -> Self {
        Self { start, stride, index: None }
    }

    /// The rows that `index` picks.
    pub fn gathered(start: *const E, stride: usize, index: &'a [i32]) -> Self {
        Self { start, stride, index: Some(index) }
    }

    /// Address of row `i`, or `None` for a row of zeros.
    #[inline(always)]
    pub fn row(&self, i: usize) -> Option<*const E> {
        let row = match self.index {
            None => i,
            Some(index) => usize::try_from(index[i]).ok()?,
        };
        Some(self.start.wrapping_add(row * self.stride))
    }

    /// The same rows from column `c` on.
    #[inline(always)]
    pub fn column(self, c: usize) -> Self {
        Self { start: self.start.wrapping_add(c), ..self }
    }

    /// Without the first `n` rows.
    #[inline(always)]
    pub fn skip(self, n: usize) -> Self {
        match self.index {
            None => Self { start: self.start.wrapping_add(n * self.stride), ..self },
            Some(index) => Self { index: Some(&index[n..]), ..self },
        }
    }
}

/// Units that `n` numbers along the contraction take, padded.
pub fn units<M: Machine>(n: usize) -> usize {
    n.div_ceil(M::UNIT).next_multiple_of(BLOCK)
}

/// Distance between rows of packed A: the padded units, and off the powers of two that share cache sets.
pub fn row_stride<M: Machine>(n: usize) -> usize {
    let units = units::<M>(n);
    if units.is_multiple_of(256) { units + BLOCK } else { units }
}

/// One row of A from `n` contiguous numbers.
///
/// # Safety
/// `dst` has room for the padded units of the row.
#[inline(always)]
pub unsafe fn pack_row<M: Machine, E: Element<Acc = M::Acc>>(
    src: Option<*const E>,
    n: usize,
    dst: *mut M::Acc,
) {
    let padded = units::<M>(n);
    // SAFETY: the source has n numbers, the destination `padded` units.
    unsafe {
        let Some(src) = src else { return std::ptr::write_bytes(dst, 0, padded) };
        if M::PAIRS {
            std::ptr::copy_nonoverlapping(src, dst.cast(), n);
            std::ptr::write_bytes(dst.cast::<E>().add(n), 0, padded * 2 - n);
        } else {
            E::widen::<M::V>(std::slice::from_raw_parts(src, n), std::slice::from_raw_parts_mut(dst, n));
            std::ptr::write_bytes(dst.add(n), 0, padded - n);
        }
    }
}

/// One register of units from contiguous numbers.
///
/// # Safety
/// Reached only from code compiled for the machine; `p` is valid for the numbers of a register.
#[inline(always)]
pub unsafe fn load<M: Machine, E: Element>(p: *const E) -> M::V {
    // SAFETY: as promised by the caller.
    unsafe { if M::PAIRS { E::load::<M::V, true>(p) } else { E::load::<M::V, false>(p) } }
}

/// As `load`, of the first `n` numbers.
///
/// # Safety
/// As `load`, with `p` valid for `n` numbers.
#[inline(always)]
pub unsafe fn load_some<M: Machine, E: Element>(p: *const E, n: usize) -> M::V {
    // SAFETY: as promised by the caller.
    unsafe { if M::PAIRS { E::load_some::<M::V, true>(p, n) } else { E::load_some::<M::V, false>(p, n) } }
}

/// The one or two rows that make unit `k` of the contraction; `None` beyond the last.
#[inline(always)]
fn rows_of_unit<M: Machine, E: Element>(src: &Rows<'_, E>, rows: usize, k: usize) -> [Option<*const E>; 2] {
    let row = |i: usize| if i < rows { src.row(i) } else { None };
    if M::PAIRS { [row(2 * k), row(2 * k + 1)] } else { [row(k), None] }
}

/// That unit for the columns `c..c + LANES`.
#[inline(always)]
unsafe fn unit<M: Machine, E: Element>(rows: [Option<*const E>; 2], c: usize, cols: usize) -> M::V {
    let full = c + M::V::LANES <= cols;
    // SAFETY: every row has `cols` numbers, and what is left of a short one is copied out first.
    unsafe {
        if M::PAIRS {
            if let (true, [Some(a), Some(b)]) = (full, rows) {
                return M::V::zip(a.add(c).cast(), b.add(c).cast());
            }
            let copies = rows.map(|row| {
                let mut copy = [E::default(); 32];
                if let Some(row) = row {
                    std::ptr::copy_nonoverlapping(row.add(c), copy.as_mut_ptr(), M::V::LANES.min(cols - c));
                }
                copy
            });
            return M::V::zip(copies[0].as_ptr().cast(), copies[1].as_ptr().cast());
        }
        match rows[0] {
            None => M::V::zero(),
            Some(row) if full => load::<M, E>(row.add(c)),
            Some(row) => load_some::<M, E>(row.add(c), cols - c),
        }
    }
}

/// `cols` rows of A, each with its contraction contiguous, from `rows` rows that run along the contraction.
///
/// # Safety
/// `dst` has room for `cols` rows of `stride` units; the source is valid for `rows x cols` numbers.
#[inline(always)]
pub unsafe fn pack_transposed<M: Machine, E: Element>(
    src: &Rows<'_, E>,
    rows: usize,
    cols: usize,
    dst: *mut M::Acc,
    stride: usize,
) {
    let lanes = M::V::LANES;
    for k in (0..units::<M>(rows)).step_by(lanes) {
        let sources: [_; 16] = std::array::from_fn(|i| rows_of_unit::<M, E>(src, rows, k + i));
        for c in (0..cols).step_by(lanes) {
            // SAFETY: as promised by the caller; LANES divides BLOCK, to which units are padded.
            unsafe {
                let mut block = [M::V::zero(); 16];
                for i in 0..lanes {
                    block[i] = unit::<M, E>(sources[i], c, cols);
                }
                M::V::transpose(&mut block[..lanes]);
                for (i, v) in block.iter().enumerate().take(lanes.min(cols - c)) {
                    v.store(dst.add((c + i) * stride + k));
                }
            }
        }
    }
}

/// Panels of B from `inner` rows that run along the contraction, `cols` columns each.
///
/// # Safety
/// `dst` has room for the panels; the source is valid for `inner x cols` numbers.
#[inline(always)]
pub unsafe fn pack_panels_kn<M: Machine, E: Element>(
    src: &Rows<'_, E>,
    inner: usize,
    cols: usize,
    dst: *mut M::Acc,
) {
    let padded = units::<M>(inner);
    for k in 0..padded {
        let source = rows_of_unit::<M, E>(src, inner, k);
        for c in (0..cols.next_multiple_of(M::COLS)).step_by(M::V::LANES) {
            let place = (c / M::COLS * padded + k) * M::COLS + c % M::COLS;
            // SAFETY: as promised by the caller.
            unsafe {
                let v = if c < cols { unit::<M, E>(source, c, cols) } else { M::V::zero() };
                v.store(dst.add(place));
            }
        }
    }
}

/// Panels of B from `cols` rows, one a column of B, each with its `inner` contraction contiguous.
///
/// # Safety
/// `dst` has room for the panels; the source is valid for `cols x inner` numbers.
#[inline(always)]
pub unsafe fn pack_panels_nk<M: Machine, E: Element>(
    src: &Rows<'_, E>,
    inner: usize,
    cols: usize,
    dst: *mut M::Acc,
) {
    let (padded, lanes) = (units::<M>(inner), M::V::LANES);
    let whole = inner / (lanes * M::UNIT) * lanes;
    for c in (0..cols.next_multiple_of(M::COLS)).step_by(lanes) {
        let panel = dst.wrapping_add(c / M::COLS * padded * M::COLS + c % M::COLS);
        let rows = src.skip(c.min(cols));
        let count = lanes.min(cols.saturating_sub(c));
        let (full, rest) = if count == lanes { (whole, whole) } else { (0, 0) };
        for k in (0..full).step_by(lanes) {
            // SAFETY: as promised by the caller; LANES rows have LANES units from k on.
            unsafe {
                let mut block = [M::V::zero(); 16];
                for i in 0..lanes {
                    block[i] = load::<M, E>(rows.start.add(i * rows.stride + k * M::UNIT));
                }
                M::V::transpose(&mut block[..lanes]);
                for i in 0..lanes {
                    block[i].store(panel.add((k + i) * M::COLS));
                }
            }
        }
        for k in (rest..padded).step_by(lanes) {
            // SAFETY: as promised by the caller; a row is read up to `inner`.
            unsafe {
                let mut block = [M::V::zero(); 16];
                let left = inner.saturating_sub(k * M::UNIT).min(lanes * M::UNIT);
                for i in 0..count {
                    block[i] =
                        load_some::<M, E>(rows.start.wrapping_add(i * rows.stride + k * M::UNIT), left);
                }
                M::V::transpose(&mut block[..lanes]);
                for i in 0..lanes {
                    block[i].store(panel.add((k + i) * M::COLS));
                }
            }
        }
    }
}
