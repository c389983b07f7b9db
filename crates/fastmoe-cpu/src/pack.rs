//! Packing: operands are laid out for the tile products, widened where the machine multiplies wider numbers, split where
//! it multiplies narrower ones.
//!
//! A becomes rows of units `[m][units]`, B panels `[n / COLS][units][COLS]`; both are padded with zeros to a
//! multiple of `BLOCK` units. Where there are planes every `BLOCK` units of the first are followed by those of the others.

use crate::dtype::Element;
use crate::machine::{BLOCK, Machine};
use crate::simd::Vector;
use half::bf16;

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

/// Units that `n` numbers along the contraction take in a plane, padded.
pub fn units<M: Machine>(n: usize) -> usize {
    n.div_ceil(M::UNIT).next_multiple_of(BLOCK)
}

/// Where unit `k` of plane `p` lies in a packed row or panel.
#[inline(always)]
pub fn place<M: Machine>(k: usize, p: usize) -> usize {
    (k / BLOCK * M::PLANES + p) * BLOCK + k % BLOCK
}

/// Where number `c` of plane `p` lies in a packed row, in cells.
#[inline(always)]
fn cell<M: Machine>(c: usize, p: usize) -> usize {
    place::<M>(c / M::UNIT, p) * M::UNIT + c % M::UNIT
}

/// Distance between rows of packed A: the padded units of all planes, and off the powers of two that share cache sets.
pub fn row_stride<M: Machine>(n: usize) -> usize {
    let units = units::<M>(n) * M::PLANES;
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
    // SAFETY: the source has n numbers, the destination the padded units of all planes.
    unsafe {
        let Some(src) = src else { return std::ptr::write_bytes(dst, 0, units::<M>(n) * M::PLANES) };
        if M::PLANES > 1 {
            split_numbers::<M, E>(src, n, dst.cast(), 0);
        } else if M::PAIRS {
            std::ptr::copy_nonoverlapping(src, dst.cast(), n);
        } else {
            E::widen::<M::V>(std::slice::from_raw_parts(src, n), std::slice::from_raw_parts_mut(dst, n));
        }
        pad_row::<M>(n, dst);
    }
}

/// Numbers `from..` of a row of A, rounded to what the machine multiplies.
///
/// # Safety
/// Reached only from code compiled for the machine; `dst` has room for the row.
#[inline(always)]
pub unsafe fn pack_numbers<M: Machine>(numbers: &[M::Acc], dst: *mut M::Acc, from: usize) {
    // SAFETY: as promised by the caller.
    unsafe {
        if M::PLANES > 1 {
            return split_numbers::<M, M::Acc>(numbers.as_ptr(), numbers.len(), dst.cast(), from);
        }
        let cells = dst.cast::<M::Cell>().add(from);
        M::Cell::narrow::<M::V>(numbers, std::slice::from_raw_parts_mut(cells, numbers.len()));
    }
}

/// The first numbers of a packed row.
///
/// # Safety
/// Reached only from code compiled for the machine; the row has as many.
#[inline(always)]
pub unsafe fn unpack_numbers<M: Machine>(row: *const M::Acc, out: &mut [M::Acc]) {
    let cells = row.cast::<M::Cell>();
    let block = if M::PLANES > 1 { BLOCK * M::UNIT } else { out.len().max(1) };
    for (i, out) in out.chunks_mut(block).enumerate() {
        let n = out.len();
        // SAFETY: as promised by the caller.
        unsafe {
            let plane = |p| std::slice::from_raw_parts(cells.add(cell::<M>(i * block, p)), n);
            M::Cell::widen::<M::V>(plane(0), out);
            for p in 1..M::PLANES {
                let mut more = [M::Acc::default(); 2 * BLOCK];
                M::Cell::widen::<M::V>(plane(p), &mut more[..n]);
                for (out, more) in out.iter_mut().zip(more) {
                    *out += more;
                }
            }
        }
    }
}

/// Zeros after the `n` numbers of a packed row.
///
/// # Safety
/// `dst` has room for the row.
#[inline(always)]
pub unsafe fn pad_row<M: Machine>(n: usize, dst: *mut M::Acc) {
    let left = units::<M>(n) * M::UNIT - n;
    if left > 0 {
        for p in 0..M::PLANES {
            // SAFETY: as promised by the caller; what is left is the end of the last block of a plane.
            unsafe { std::ptr::write_bytes(dst.cast::<M::Cell>().add(cell::<M>(n, p)), 0, left) };
        }
    }
}

/// `n` numbers as numbers `from..` of a row of A in planes of bf16.
#[inline(always)]
unsafe fn split_numbers<M: Machine, E: Element>(src: *const E, n: usize, row: *mut bf16, from: usize) {
    let (lanes, block) = (M::V::LANES, BLOCK * M::UNIT);
    let mut i = 0;
    while i < n {
        let some = (block - (from + i) % block).min(n - i);
        let first = some.min(lanes);
        // SAFETY: as promised by the callers; no more is read or written than there is.
        unsafe {
            let low = load_up_to::<M, E>(src.add(i), first);
            let high = load_up_to::<M, E>(src.add(i + first), some - first);
            let (low, high) = (split::<M>(low), split::<M>(high));
            for p in 0..M::PLANES {
                let both = M::V::round_to_bf16([low[p], high[p]]);
                let dst = row.add(cell::<M>(from + i, p));
                if some == block {
                    both.store(dst.cast());
                } else {
                    let mut copy = [bf16::ZERO; 32];
                    both.store(copy.as_mut_ptr().cast());
                    std::ptr::copy_nonoverlapping(copy.as_ptr(), dst, some);
                }
            }
        }
        i += some;
    }
}

#[inline(always)]
unsafe fn split<M: Machine>(v: M::V) -> [M::V; 3] {
    // SAFETY: reached only from code compiled for the machine.
    unsafe { if M::PLANES == 2 { v.split::<2>() } else { v.split::<3>() } }
}

/// The planes of the units that two registers of numbers make.
#[inline(always)]
unsafe fn split_pairs<M: Machine>(low: M::V, high: M::V) -> [M::V; 3] {
    // SAFETY: reached only from code compiled for the machine.
    unsafe {
        let (low, high) = (split::<M>(low), split::<M>(high));
        let mut pairs = low;
        for p in 0..M::PLANES {
            pairs[p] = low[p].pair(high[p]);
        }
        pairs
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

/// A register of numbers, or of the first `n`, zeros after them.
#[inline(always)]
unsafe fn load_up_to<M: Machine, E: Element>(p: *const E, n: usize) -> M::V {
    // SAFETY: as promised by the caller: `p` is valid for `n` numbers.
    unsafe { if n >= M::V::LANES { load::<M, E>(p) } else { load_some::<M, E>(p, n) } }
}

/// The one or two rows that make unit `k` of the contraction; `None` beyond the last.
#[inline(always)]
fn rows_of_unit<M: Machine, E: Element>(src: &Rows<'_, E>, rows: usize, k: usize) -> [Option<*const E>; 2] {
    let row = |i: usize| if i < rows { src.row(i) } else { None };
    if M::PAIRS { [row(2 * k), row(2 * k + 1)] } else { [row(k), None] }
}

/// The planes of that unit for the columns `c..c + LANES`; of rows that are `PACKED` already, or of a tensor.
#[inline(always)]
unsafe fn unit<M: Machine, E: Element, const PACKED: bool>(
    rows: [Option<*const E>; 2],
    c: usize,
    cols: usize,
) -> [M::V; 3] {
    // SAFETY: as for `plain_unit`.
    unsafe {
        let mut planes = [M::V::zero(); 3];
        if M::PLANES == 1 {
            planes[0] = plain_unit::<M, E>(rows, c, cols);
        } else if PACKED {
            for p in 0..M::PLANES {
                let mut rows = rows;
                for row in rows.iter_mut().flatten() {
                    *row = row.wrapping_add(cell::<M>(c, p));
                }
                planes[p] = plain_unit::<M, E>(rows, 0, cols - c);
            }
        } else {
            let mut numbers = planes;
            for (v, row) in numbers.iter_mut().zip(rows) {
                if let Some(row) = row {
                    *v = load_up_to::<M, E>(row.add(c), cols - c);
                }
            }
            planes = split_pairs::<M>(numbers[0], numbers[1]);
        }
        planes
    }
}

#[inline(always)]
unsafe fn plain_unit<M: Machine, E: Element>(rows: [Option<*const E>; 2], c: usize, cols: usize) -> M::V {
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
            Some(row) => load_up_to::<M, E>(row.add(c), cols - c),
        }
    }
}

/// `cols` rows of A, each with its contraction contiguous, from `rows` rows that run along the contraction.
///
/// # Safety
/// `dst` has room for `cols` rows of `stride` units; the source is valid for `rows x cols` numbers.
#[inline(always)]
pub unsafe fn pack_transposed<M: Machine, E: Element, const PACKED: bool>(
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
                let mut planes = [[M::V::zero(); 16]; 3];
                for i in 0..lanes {
                    let unit = unit::<M, E, PACKED>(sources[i], c, cols);
                    for p in 0..M::PLANES {
                        planes[p][i] = unit[p];
                    }
                }
                for (p, block) in planes.iter_mut().enumerate().take(M::PLANES) {
                    M::V::transpose(&mut block[..lanes]);
                    for (i, v) in block.iter().enumerate().take(lanes.min(cols - c)) {
                        v.store(dst.add((c + i) * stride + place::<M>(k, p)));
                    }
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
pub unsafe fn pack_panels_kn<M: Machine, E: Element, const PACKED: bool>(
    src: &Rows<'_, E>,
    inner: usize,
    cols: usize,
    dst: *mut M::Acc,
) {
    let padded = units::<M>(inner);
    for k in 0..padded {
        let source = rows_of_unit::<M, E>(src, inner, k);
        for c in (0..cols.next_multiple_of(M::COLS)).step_by(M::V::LANES) {
            let panel = dst.wrapping_add(c / M::COLS * padded * M::PLANES * M::COLS + c % M::COLS);
            // SAFETY: as promised by the caller.
            unsafe {
                let unit = if c < cols { unit::<M, E, PACKED>(source, c, cols) } else { [M::V::zero(); 3] };
                for p in 0..M::PLANES {
                    unit[p].store(panel.add(place::<M>(k, p) * M::COLS));
                }
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
    // Units that LANES registers make: numbers are transposed before they are split and paired.
    let step = if M::PLANES > 1 { lanes / M::UNIT } else { lanes };
    let whole = inner / (step * M::UNIT) * step;
    for c in (0..cols.next_multiple_of(M::COLS)).step_by(lanes) {
        let panel = dst.wrapping_add(c / M::COLS * padded * M::PLANES * M::COLS + c % M::COLS);
        let rows = src.skip(c.min(cols));
        let count = lanes.min(cols.saturating_sub(c));
        let (full, rest) = if count == lanes { (whole, whole) } else { (0, 0) };
        for k in (0..full).step_by(step) {
            // SAFETY: as promised by the caller; LANES rows have LANES units from k on.
            unsafe {
                let mut block = [M::V::zero(); 16];
                for i in 0..lanes {
                    block[i] = load::<M, E>(rows.start.add(i * rows.stride + k * M::UNIT));
                }
                transpose_to_panel::<M>(&mut block, panel, k);
            }
        }
        for k in (rest..padded).step_by(step) {
            // SAFETY: as promised by the caller; a row is read up to `inner`.
            unsafe {
                let mut block = [M::V::zero(); 16];
                let left = inner.saturating_sub(k * M::UNIT).min(step * M::UNIT);
                for i in 0..count {
                    block[i] =
                        load_some::<M, E>(rows.start.wrapping_add(i * rows.stride + k * M::UNIT), left);
                }
                transpose_to_panel::<M>(&mut block, panel, k);
            }
        }
    }
}

/// From one column a register to the units `k..` of a panel.
#[inline(always)]
unsafe fn transpose_to_panel<M: Machine>(columns: &mut [M::V; 16], panel: *mut M::Acc, k: usize) {
    let lanes = M::V::LANES;
    // SAFETY: as promised by the caller of `pack_panels_nk`.
    unsafe {
        M::V::transpose(&mut columns[..lanes]);
        if M::PLANES == 1 {
            for i in 0..lanes {
                columns[i].store(panel.add((k + i) * M::COLS));
            }
            return;
        }
        for i in 0..lanes / 2 {
            let unit = split_pairs::<M>(columns[2 * i], columns[2 * i + 1]);
            for p in 0..M::PLANES {
                unit[p].store(panel.add(place::<M>(k + i, p) * M::COLS));
            }
        }
    }
}
