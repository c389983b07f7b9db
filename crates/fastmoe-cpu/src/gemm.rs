//! One task's product: packed A by a block of B, which is packed on the way where the rows of A repay it.

use crate::dots::{Columns, Dots};
use crate::dtype::Element;
use crate::machine::{BLOCK, Machine, Tile, TileUpdate};
use crate::memory::Scratch;
use crate::pack::{Rows, pack_panels_kn, pack_panels_nk, units};
use crate::prefetch::Prefetch;
use crate::quantized::{Quantized, Room};
use crate::scaled::{FEW_TILES, ScaledRows};

/// Most units of the contraction in a packed panel of rows that are contiguous along it: long runs of memory are
/// what the hardware's own prefetching needs.
const DEEP: usize = 2048;

/// Units of A, of each plane, that stay in the second cache beside a panel of B.
pub const A_IN_CACHE: usize = 128 << 10;

/// Most units of the contraction in a packed block of rows that are contiguous across it.
const SHALLOW: usize = 128;

/// Fewer rows of A are multiplied by whole tiles so fast that lines on their way from memory would hold the buffers that the
/// loads of these tiles wait for (measured).
const ROWS_TO_LOOK_AHEAD: usize = 128;

/// Columns of a quantized B that few rows of A are multiplied by at a time: whole groups of `Dots`, so that its sums are
/// those of a plain B, and few enough for the first cache.
const STRIP: usize = 4;

/// Up to so many rows of A, numbers of a quantized B are best made in registers, without going through memory (measured).
const LOOKED_UP_ROWS: usize = 2;

/// A matrix `[inner, cols]` as it lies in memory.
#[derive(Clone, Copy)]
pub enum Factor<'a, E> {
    /// Each row is a column of B, contraction contiguous.
    Nk(Rows<'a, E>),
    /// Rows run along the contraction.
    Kn(Rows<'a, E>),
    /// `Nk`, once it is dequantized.
    QuantizedNk(Quantized<E>),
    /// `Kn`, once it is dequantized.
    QuantizedKn(Quantized<E>),
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
            Self::QuantizedNk(part) => Self::QuantizedKn(part),
            Self::QuantizedKn(part) => Self::QuantizedNk(part),
        }
    }

    /// Whether a column of B, rather than a row, is contiguous.
    #[inline(always)]
    pub fn is_nk(&self) -> bool {
        matches!(self, Self::Nk(_) | Self::QuantizedNk(_))
    }

    fn is_quantized(&self) -> bool {
        matches!(self, Self::QuantizedNk(_) | Self::QuantizedKn(_))
    }

    /// From column `c` of B on.
    #[inline(always)]
    pub fn column(self, c: usize) -> Self {
        match self {
            Self::Nk(rows) => Self::Nk(rows.skip(c)),
            Self::Kn(rows) => Self::Kn(rows.column(c)),
            Self::QuantizedNk(part) => Self::QuantizedNk(part.skip(c)),
            Self::QuantizedKn(part) => Self::QuantizedKn(part.column(c)),
        }
    }

    /// From row `k` of B on.
    #[inline(always)]
    fn row(self, k: usize) -> Self {
        match self {
            Self::Nk(rows) => Self::Nk(rows.column(k)),
            Self::Kn(rows) => Self::Kn(rows.skip(k)),
            Self::QuantizedNk(part) => Self::QuantizedNk(part.column(k)),
            Self::QuantizedKn(part) => Self::QuantizedKn(part.skip(k)),
        }
    }

    /// Memory for `inner` rows and `cols` columns of a quantized B.
    pub fn room<M: Machine>(&self, inner: usize, cols: usize) -> Option<Room<M>> {
        match self {
            Self::QuantizedNk(part) => Some(Room::new(part, cols, inner)),
            Self::QuantizedKn(part) => Some(Room::new(part, inner, cols)),
            _ => None,
        }
    }

    /// The first `inner` rows and `cols` columns of B as numbers, those of a quantized one in its `room`.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; B has these rows and columns, `room` was made for as many.
    #[inline(always)]
    pub unsafe fn plain<M: Machine>(self, inner: usize, cols: usize, room: &mut Option<Room<M>>) -> Self {
        // SAFETY: as promised by the caller.
        unsafe {
            match (self, room) {
                (Self::QuantizedNk(part), Some(room)) => Self::Nk(part.dequantize(cols, inner, room)),
                (Self::QuantizedKn(part), Some(room)) => Self::Kn(part.dequantize(inner, cols, room)),
                (plain, _) => plain,
            }
        }
    }

    #[inline(always)]
    unsafe fn pack<M: Machine>(&self, inner: usize, cols: usize, dst: *mut M::Acc) {
        // SAFETY: as promised by the caller.
        unsafe {
            match self {
                Self::Nk(rows) => pack_panels_nk::<M, E>(rows, inner, cols, dst),
                Self::Kn(rows) => pack_panels_kn::<M, E, false>(rows, inner, cols, dst),
                _ => unreachable!("dequantized before it is packed"),
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, inner: usize, cols: usize, steps: usize) -> Prefetch {
        let size = size_of::<E>();
        match self {
            Self::Nk(rows) => Prefetch::new(rows.start.cast(), cols, inner * size, rows.stride * size, steps),
            Self::Kn(rows) => Prefetch::new(rows.start.cast(), inner, cols * size, rows.stride * size, steps),
            Self::QuantizedNk(part) => part.prefetch(cols, inner, steps),
            Self::QuantizedKn(part) => part.prefetch(inner, cols, steps),
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
        if self.rows <= M::few_rows() && self.parts[0].is_nk() {
            // SAFETY: as promised by the caller.
            return unsafe { self.dots() };
        }
        if self.is_turned() {
            // SAFETY: as promised by the caller.
            return unsafe { self.turned() };
        }
        let c_stride = self.c_stride();
        let width = padded_cols::<M>(self.cols);
        if self.inner == 0 {
            // SAFETY: C has room for all its rows.
            unsafe { std::ptr::write_bytes(self.c, 0, self.rows * c_stride) };
        }
        // The block of B that is packed at a time follows the direction in which its memory is contiguous, unless
        // that would send more rows of A through the cache for every panel than it holds.
        let a_stays = self.rows * units::<M>(self.inner) <= A_IN_CACHE;
        let (cols, units_at_once) = match self.parts[0] {
            b if b.is_nk() && a_stays => (M::COLS, DEEP.min(units::<M>(self.inner))),
            b if b.is_nk() => (width, M::DEPTH),
            _ => (width, SHALLOW.min(M::DEPTH)),
        };
        let in_place = self.in_place();
        let packed = Scratch::<M::Acc>::new(if in_place { 0 } else { units_at_once * cols * M::PLANES });
        let mut room = self.parts[0].room::<M>(units_at_once * M::UNIT, cols);
        let across = self.cols.div_ceil(cols);
        let blocks_of_k = self.inner.div_ceil(units_at_once * M::UNIT);
        let blocks = blocks_of_k * self.parts.len() * across;
        for i in 0..blocks {
            let block = self.block(i, across, cols, units_at_once * M::UNIT);
            // SAFETY: as promised by the caller; `packed` has room for the block.
            unsafe {
                let factor = block.factor.plain(block.inner, block.cols, &mut room);
                if !in_place {
                    factor.pack::<M>(block.inner, block.cols, packed.ptr());
                }
                let steps = padded_cols::<M>(block.cols) / M::COLS
                    * self.rows.div_ceil(M::ROWS)
                    * units::<M>(block.inner)
                    / BLOCK;
                let mut ahead = if M::WHOLE_TILES && self.rows < ROWS_TO_LOOK_AHEAD {
                    Prefetch::NONE
                } else if i + 1 < blocks {
                    let next = self.block(i + 1, across, cols, units_at_once * M::UNIT);
                    next.factor.prefetch(next.inner, next.cols, steps)
                } else {
                    let first = (cols.min(self.cols), self.inner.min(units_at_once * M::UNIT));
                    self.next.map_or(Prefetch::NONE, |next| next.prefetch(first.1, first.0, steps))
                };
                match factor {
                    Factor::Kn(b) if in_place => M::call(ScaledRows {
                        a: self.a.add(block.from / M::UNIT),
                        a_stride: self.a_stride,
                        rows: self.rows,
                        b,
                        units: block.inner / M::UNIT,
                        cols: block.cols,
                        c: self.c.add(block.c),
                        c_stride,
                        accumulate: block.from > 0,
                        ahead: &mut ahead,
                    }),
                    _ => self.tiles(&block, packed.ptr(), &mut ahead),
                }
            }
        }
    }

    /// Inner products with the rows of B where they lie, or where a few at a time are dequantized.
    #[inline(always)]
    unsafe fn dots(&self) {
        let strip = if self.parts[0].is_quantized() { STRIP } else { self.cols };
        let mut room = self.parts[0].room::<M>(self.inner, strip);
        for (p, &part) in self.parts.iter().enumerate() {
            let c = self.c.wrapping_add(p * padded_cols::<M>(self.cols));
            if let (Factor::QuantizedNk(part), Some(room)) = (part, &mut room)
                && self.rows <= LOOKED_UP_ROWS
                && let Some(pieces) = part.looked_up::<M>(self.cols)
            {
                for (from, to) in pieces {
                    // SAFETY: as promised by the caller of `compute`.
                    unsafe { self.some_dots(part.codes_of(from, room), to - from, c.add(from)) }
                }
                continue;
            }
            for from in (0..self.cols).step_by(strip) {
                let cols = strip.min(self.cols - from);
                // SAFETY: as promised by the caller of `compute`; `room` has room for the strip.
                unsafe {
                    let Factor::Nk(w) = part.column(from).plain(self.inner, cols, &mut room) else {
                        unreachable!("the parts of B lie alike")
                    };
                    self.some_dots(w, cols, c.add(from));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn some_dots<W: Columns<M>>(&self, w: W, cols: usize, c: *mut M::Acc) {
        let (a, a_stride, rows, inner) = (self.a, self.a_stride, self.rows, self.inner);
        // SAFETY: as promised by the caller of `compute`.
        unsafe { Dots { a, a_stride, rows, w, inner, cols, c, c_stride: self.c_stride() }.compute() }
    }

    /// Whether rows of B along the contraction are better left where they are.
    fn in_place(&self) -> bool {
        !self.parts[0].is_nk()
            && self.rows <= FEW_TILES * M::ROWS
            && !M::WHOLE_TILES
            && self.cols.is_multiple_of(M::COLS)
            && self.inner.is_multiple_of(M::UNIT)
    }

    /// Block `i` of B: the contraction outermost, then the parts, then the columns.
    #[inline(always)]
    fn block(&self, i: usize, across: usize, cols: usize, inner: usize) -> Block<'_, E> {
        let (from, part, col) =
            (i / across / self.parts.len() * inner, i / across % self.parts.len(), i % across * cols);
        Block {
            factor: self.parts[part].row(from).column(col),
            from,
            inner: inner.min(self.inner - from),
            cols: cols.min(self.cols - col),
            c: part * padded_cols::<M>(self.cols) + col,
        }
    }

    /// All tiles of one packed block.
    #[inline(always)]
    unsafe fn tiles(&self, block: &Block<'_, E>, packed: *const M::Acc, ahead: &mut Prefetch) {
        let units = units::<M>(block.inner);
        let panels = padded_cols::<M>(block.cols) / M::COLS;
        let steps = (0..units).step_by(M::DEPTH);
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            if M::PLANES > 1 {
                // Rows of all planes fill L1; panels, which lie in one piece, go by.
                for k in steps {
                    for rows in row_groups::<M>(self.rows) {
                        for panel in 0..panels {
                            self.tile(block, packed, panel, k, rows, ahead);
                        }
                    }
                }
                return;
            }
            for panel in 0..panels {
                for k in steps.clone() {
                    for rows in row_groups::<M>(self.rows) {
                        self.tile(block, packed, panel, k, rows, ahead);
                    }
                }
            }
        }
    }

    /// Rows of A with a panel of a packed block, from unit `k` of the block on.
    #[inline(always)]
    unsafe fn tile(
        &self,
        block: &Block<'_, E>,
        packed: *const M::Acc,
        panel: usize,
        k: usize,
        (start, end): (usize, usize),
        ahead: &mut Prefetch,
    ) {
        let units = units::<M>(block.inner);
        // SAFETY: as promised by the caller of `compute`.
        unsafe {
            M::tile(Tile {
                a: self.a.add(start * self.a_stride + (block.from / M::UNIT + k) * M::PLANES),
                a_stride: self.a_stride,
                rows: end - start,
                cols: M::COLS,
                b: packed.add((panel * units + k) * M::PLANES * M::COLS),
                units: M::DEPTH.min(units - k),
                c: self.c.add(start * self.c_stride() + block.c + panel * M::COLS),
                c_stride: self.c_stride(),
                update: if block.from + k > 0 { TileUpdate::Add } else { TileUpdate::Write },
                ahead,
            });
        }
    }
}

/// A part of B that is packed at a time.
struct Block<'a, E> {
    factor: Factor<'a, E>,
    /// Where it starts along the contraction, and how much of it.
    from: usize,
    inner: usize,
    /// Its columns, and where they start in C.
    cols: usize,
    c: usize,
}

/// Splits rows into tiles.
pub fn row_groups<M: Machine>(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    groups::<M>(rows, M::ROWS)
}

/// Splits rows into groups of at most `most`: of one size where a tile may have any, else whole ones and a rest.
pub fn groups<M: Machine>(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let groups = rows.div_ceil(most);
    (0..groups).map(move |g| {
        if M::WHOLE_TILES {
            (g * most, rows.min((g + 1) * most))
        } else {
            (rows * g / groups, rows * (g + 1) / groups)
        }
    })
}
