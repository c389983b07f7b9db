//! One task's product: packed A by a block of B that is packed on the way.

use crate::dtype::Element;
use crate::machine::{BLOCK, Machine, Tile};
use crate::memory::Scratch;
use crate::pack::{Rows, dots, pack_panels_kn, pack_panels_nk, units};
use crate::prefetch::Prefetch;

/// Units of the contraction in a packed sub-block.
const DEPTH: usize = 256;
/// Up to this many rows read B in place, where packing it would cost more than the product.
const FEW_ROWS: usize = 8;

/// A matrix `[inner, cols]` as it lies in memory.
#[derive(Clone, Copy)]
pub enum Factor<'a, E> {
    /// Each row is a column of B, contraction contiguous.
    Nk(Rows<'a, E>),
    /// Rows run along the contraction.
    Kn(Rows<'a, E>),
}

impl<'a, E: Element> Factor<'a, E> {
    /// A weight matrix `[cols, inner]`, or `[inner, cols]` where `transposed`.
    pub fn weight(start: *const E, inner: usize, cols: usize, transposed: bool) -> Self {
        if transposed { Self::Kn(Rows::dense(start, cols)) } else { Self::Nk(Rows::dense(start, inner)) }
    }

    /// The transpose of the same memory.
    pub fn t(self) -> Self {
        match self {
            Self::Nk(rows) => Self::Kn(rows),
            Self::Kn(rows) => Self::Nk(rows),
        }
    }

    /// From column `c` of B on.
    #[inline(always)]
    pub fn column(self, c: usize) -> Self {
        match self {
            Self::Nk(rows) => Self::Nk(rows.skip(c)),
            Self::Kn(rows) => Self::Kn(rows.column(c)),
        }
    }

    /// From row `k` of B on.
    #[inline(always)]
    fn row(self, k: usize) -> Self {
        match self {
            Self::Nk(rows) => Self::Nk(rows.column(k)),
            Self::Kn(rows) => Self::Kn(rows.skip(k)),
        }
    }

    #[inline(always)]
    unsafe fn pack<M: Machine>(&self, inner: usize, cols: usize, dst: *mut M::Acc) {
        // SAFETY: as promised by the caller.
        unsafe {
            match self {
                Self::Nk(rows) => pack_panels_nk::<M, E>(rows, inner, cols, dst),
                Self::Kn(rows) => pack_panels_kn::<M, E>(rows, inner, cols, dst),
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, inner: usize, cols: usize, steps: usize) -> Prefetch {
        let size = size_of::<E>();
        match self {
            Self::Nk(rows) => Prefetch::new(rows.start.cast(), cols, inner * size, rows.stride * size, steps),
            Self::Kn(rows) => Prefetch::new(rows.start.cast(), inner, cols * size, rows.stride * size, steps),
        }
    }
}

/// `C[rows, parts * cols] = A[rows, inner] [B_0 | B_1 | ..]`, every part `cols` wide.
pub struct Product<'a, M: Machine, E> {
    /// Rows of packed A (`pack_row`).
    pub a: *const M::Acc,
    /// Units from one row of A to the next.
    pub a_stride: usize,
    /// Rows of A and C; both have memory up to the next multiple of `Machine::ROWS`.
    pub rows: usize,
    /// Length of the contraction, in numbers.
    pub inner: usize,
    /// The parts of B.
    pub parts: &'a [Factor<'a, E>],
    /// Columns of a part.
    pub cols: usize,
    /// What the next task will read, if known.
    pub next: Option<Factor<'a, E>>,
    /// Sums; a part starts every `padded_cols` columns.
    pub c: *mut M::Acc,
}

/// Columns that a part takes in C.
pub fn padded_cols<M: Machine>(cols: usize) -> usize {
    cols.next_multiple_of(M::COLS)
}

/// Numbers that C takes for `rows` rows of `parts` parts.
pub fn sums_len<M: Machine>(rows: usize, parts: usize, cols: usize) -> usize {
    rows.next_multiple_of(M::ROWS) * parts * padded_cols::<M>(cols)
}

impl<M: Machine, E: Element<Acc = M::Acc>> Product<'_, M, E> {
    /// Numbers from one row of C to the next.
    pub fn c_stride(&self) -> usize {
        self.parts.len() * padded_cols::<M>(self.cols)
    }

    /// Computes C.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the pointers are valid for the sizes above.
    #[inline(always)]
    pub unsafe fn compute(&self) {
        let c_stride = self.c_stride();
        let width = padded_cols::<M>(self.cols);
        if let (true, Factor::Nk(_)) = (self.rows <= FEW_ROWS, self.parts[0]) {
            for (p, part) in self.parts.iter().enumerate() {
                let Factor::Nk(w) = part else { unreachable!("the parts of B lie alike") };
                // SAFETY: as promised by the caller.
                unsafe {
                    let c = self.c.add(p * width);
                    dots::<M, E>(self.rows, self.a, self.a_stride, w, self.inner, self.cols, c, c_stride);
                }
            }
            return;
        }
        if self.inner == 0 {
            // SAFETY: C has room for all its rows.
            unsafe { std::ptr::write_bytes(self.c, 0, self.rows * c_stride) };
        }
        let depth = DEPTH * M::UNIT;
        let packed = Scratch::<M::Acc>::new(DEPTH * width);
        for from in (0..self.inner).step_by(depth) {
            let inner = depth.min(self.inner - from);
            for (p, part) in self.parts.iter().enumerate() {
                // SAFETY: as promised by the caller; `packed` has room for DEPTH units of the columns.
                unsafe {
                    part.row(from).pack::<M>(inner, self.cols, packed.ptr());
                    let next = if p + 1 < self.parts.len() {
                        Some(self.parts[p + 1].row(from))
                    } else if from + depth < self.inner {
                        Some(self.parts[0].row(from + depth))
                    } else {
                        self.next
                    };
                    let steps = width / M::COLS * self.rows.div_ceil(M::ROWS) * units::<M>(inner) / BLOCK;
                    let mut ahead = next.map_or(Prefetch::NONE, |n| n.prefetch(inner, self.cols, steps));
                    let c = self.c.add(p * width);
                    self.tiles(packed.ptr(), from, units::<M>(inner), c, &mut ahead);
                }
            }
        }
    }

    /// All tiles of one packed sub-block.
    #[inline(always)]
    unsafe fn tiles(
        &self,
        packed: *const M::Acc,
        from: usize,
        units: usize,
        c: *mut M::Acc,
        ahead: &mut Prefetch,
    ) {
        for panel in 0..padded_cols::<M>(self.cols) / M::COLS {
            for (start, end) in row_groups::<M>(self.rows) {
                // SAFETY: as promised by the caller of `compute`.
                unsafe {
                    M::tile(Tile {
                        a: self.a.add(start * self.a_stride + from / M::UNIT),
                        a_stride: self.a_stride,
                        rows: end - start,
                        b: packed.add(panel * units * M::COLS),
                        units,
                        c: c.add(start * self.c_stride() + panel * M::COLS),
                        c_stride: self.c_stride(),
                        accumulate: from > 0,
                        ahead,
                    });
                }
            }
        }
    }
}

/// Splits rows into tiles: of one size where a tile may have any, else whole ones and a rest.
pub fn row_groups<M: Machine>(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let groups = rows.div_ceil(M::ROWS);
    (0..groups).map(move |g| {
        if M::WHOLE_TILES {
            (g * M::ROWS, rows.min((g + 1) * M::ROWS))
        } else {
            (rows * g / groups, rows * (g + 1) / groups)
        }
    })
}
