//! Quantized weights: small codes with a scale for each block of them, of which a product makes numbers a block at
//! a time, just before it reads them.

use crate::codes::{CHUNK, Mxfp4Tables, fp8_chunk, fp8_table, mxfp4_block};
use crate::dots::Columns;
use crate::dtype::Element;
use crate::machine::{Machine, Op};
use crate::memory::Scratch;
use crate::pack::{Rows, load_some};
use crate::prefetch::{LINE, Prefetch};
use crate::problem::{Format, Ptr};
use crate::simd::{Vector, prefetch_l2};
use std::marker::PhantomData;

/// Rows and columns that share a scale in FP8.
const SQUARE: usize = 128;

/// A part of one expert's weight `[.., inner]`.
#[derive(Clone, Copy)]
pub struct Quantized<E> {
    format: Format,
    codes: Ptr,
    scales: Ptr,
    inner: usize,
    row: usize,
    column: usize,
    elements: PhantomData<E>,
}

impl<E: Element> Quantized<E> {
    /// All of a weight `[rows, inner]` of an expert.
    pub fn new(format: Format, codes: Ptr, scales: Ptr, [expert, rows, inner]: [usize; 3]) -> Self {
        let (codes_len, scales_len) = match format {
            Format::Mxfp4 => (rows * inner / 2, rows * inner / CHUNK),
            Format::Fp8 => (rows * inner, 4 * rows.div_ceil(SQUARE) * inner.div_ceil(SQUARE)),
        };
        Self {
            format,
            codes: codes.wrapping_add(expert * codes_len),
            scales: scales.wrapping_add(expert * scales_len),
            inner,
            row: 0,
            column: 0,
            elements: PhantomData,
        }
    }

    /// From row `n` on.
    #[inline(always)]
    pub fn skip(self, n: usize) -> Self {
        Self { row: self.row + n, ..self }
    }

    /// From column `c` on.
    #[inline(always)]
    pub fn column(self, c: usize) -> Self {
        Self { column: self.column + c, ..self }
    }

    fn row_bytes(&self) -> usize {
        match self.format {
            Format::Mxfp4 => self.inner / 2,
            Format::Fp8 => self.inner,
        }
    }

    /// The codes of row `r` from column `c` on.
    #[inline(always)]
    fn codes(&self, r: usize, c: usize) -> Ptr {
        let at = (self.row + r) * self.inner + self.column + c;
        self.codes.wrapping_add(if self.format == Format::Mxfp4 { at / 2 } else { at })
    }

    /// A walk over the codes of `rows x cols` numbers.
    pub fn prefetch(&self, rows: usize, cols: usize, steps: usize) -> Prefetch {
        let bytes = if self.format == Format::Mxfp4 { cols / 2 } else { cols };
        Prefetch::new(self.codes(0, 0), rows, bytes, self.row_bytes(), steps)
    }

    /// `rows x cols` numbers, put into `room`.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the weight has these rows and columns, and `room` was made for
    /// as many or more.
    #[inline(always)]
    pub unsafe fn dequantize<M: Machine>(
        &self,
        rows: usize,
        cols: usize,
        room: &mut Room<M>,
    ) -> Rows<'static, E> {
        let out = room.numbers.ptr().cast();
        // SAFETY: as promised by the caller.
        unsafe { M::call(Dequantize { part: *self, rows, cols, room, out }) };
        Rows::dense(out, cols)
    }
}

impl<E: Element> Quantized<E> {
    /// The pieces, where each starts and ends, in which `rows` rows can be looked up as they are multiplied; `None` where
    /// they have to be dequantized first.
    pub fn looked_up<M: Machine>(
        &self,
        rows: usize,
    ) -> Option<impl Iterator<Item = (usize, usize)> + use<M, E>> {
        // Groups of `Dots` must not be cut: sums would differ in their order from those of numbers.
        let whole = self.row.is_multiple_of(4) && self.column == 0;
        (M::PAIRS && looks_up::<M, E>() && whole).then(|| pieces(self.row, rows))
    }

    /// Rows from `from` on, of one piece, to be looked up.
    ///
    /// # Safety
    /// As `dequantize`.
    #[inline(always)]
    pub unsafe fn codes_of<M: Machine>(&self, from: usize, room: &mut Room<M>) -> Codes<E> {
        let part = self.skip(from);
        let across = part.inner.div_ceil(SQUARE);
        let scales = part.scales.cast::<f32>().wrapping_add(part.row / SQUARE * across);
        let squares = if part.format == Format::Fp8 { across } else { 0 };
        // SAFETY: as promised by the caller.
        Codes { part, scales, tables: unsafe { room.tables(scales, squares) }, numbers: E::mxfp4_tables() }
    }
}

/// Rows of a weight that a machine looks up as it multiplies them.
pub struct Codes<E: Element> {
    part: Quantized<E>,
    scales: *const f32,
    tables: *const E,
    numbers: &'static Mxfp4Tables<E>,
}

impl<M: Machine, E: Element> Columns<M> for Codes<E> {
    /// The codes, and the scales of MXFP4.
    type Row = [Ptr; 2];
    /// Tables of scales stay in registers for four rows.
    const ONE_STREAM: bool = false;
    #[inline(always)]
    fn row(&self, i: usize) -> [Ptr; 2] {
        [
            self.part.codes(i, 0),
            self.part.scales.wrapping_add((self.part.row + i) * (self.part.inner / CHUNK)),
        ]
    }
    #[inline(always)]
    unsafe fn load(&self, [codes, scales]: [Ptr; 2], from: usize) -> M::V {
        // SAFETY: as promised by the caller; a register is a chunk.
        unsafe {
            match self.part.format {
                Format::Mxfp4 => {
                    let table = &self.numbers[usize::from(*scales.add(from / CHUNK))];
                    M::V::look_up_nibbles(codes.add(from / 2), table.as_ptr().cast())
                }
                Format::Fp8 => {
                    let table = self.tables.add(from / SQUARE * Room::<M>::TABLE);
                    M::V::look_up_bytes(codes.add(from), &registers::<M, E>(table))
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn load_some(&self, [codes, _]: [Ptr; 2], from: usize, n: usize) -> M::V {
        // Only FP8 has a part of a chunk.
        let mut some = [0; CHUNK];
        // SAFETY: as promised by the caller.
        unsafe {
            std::ptr::copy_nonoverlapping(codes.add(from), some.as_mut_ptr(), n);
            let numbers = fp8_chunk::<E>(&some, *self.scales.add(from / SQUARE));
            load_some::<M, E>(numbers.as_ptr(), n)
        }
    }
    #[inline(always)]
    fn prefetch(&self, [codes, _]: [Ptr; 2], from: usize, together: usize) {
        if from.is_multiple_of(2 * LINE) {
            let bytes = if self.part.format == Format::Mxfp4 { from / 2 } else { from };
            let soon = codes.wrapping_add(bytes + together * self.part.row_bytes());
            prefetch_l2(soon);
            if self.part.format == Format::Fp8 {
                prefetch_l2(soon.wrapping_add(LINE));
            }
        }
    }
}

/// Memory to dequantize to.
pub struct Room<M: Machine> {
    numbers: Scratch<M::Acc>,
    /// Where the machine looks numbers up: those of FP8 that are not negative, by each scale of a row of squares.
    tables: Option<Scratch<M::Acc>>,
    /// The first of those scales, and how many.
    of: (*const f32, usize),
}

impl<M: Machine> Room<M> {
    const TABLE: usize = 128;

    /// For `rows x cols` numbers of a weight.
    pub fn new<E: Element>(part: &Quantized<E>, rows: usize, cols: usize) -> Self {
        let scratch = |numbers: usize| Scratch::new((numbers * size_of::<E>()).div_ceil(size_of::<M::Acc>()));
        let looks_up = part.format == Format::Fp8 && looks_up::<M, E>();
        let tables = looks_up.then(|| scratch((cols.div_ceil(SQUARE) + 1) * Self::TABLE));
        Self { numbers: scratch(rows * cols), tables, of: (std::ptr::null(), 0) }
    }

    /// The tables of `squares` scales, one after the other; null where nothing is looked up.
    #[inline(always)]
    unsafe fn tables<E: Element>(&mut self, scales: *const f32, squares: usize) -> *const E {
        let Some(tables) = &self.tables else { return std::ptr::null() };
        let start = tables.ptr().cast::<E>();
        if self.of != (scales, squares) {
            for square in 0..squares {
                // SAFETY: as promised by the caller of `dequantize`.
                unsafe {
                    let table = start.add(square * Self::TABLE);
                    fp8_table(*scales.add(square), std::slice::from_raw_parts_mut(table, Self::TABLE));
                }
            }
            self.of = (scales, squares);
        }
        start
    }
}

/// A table of 128 numbers of 16 bits.
#[inline(always)]
unsafe fn registers<M: Machine, E>(table: *const E) -> [M::V; 4] {
    let table = table.cast::<[E; CHUNK]>();
    // SAFETY: as promised by the caller of `dequantize`; a register holds a chunk.
    unsafe {
        [
            M::V::load(table.cast()),
            M::V::load(table.add(1).cast()),
            M::V::load(table.add(2).cast()),
            M::V::load(table.add(3).cast()),
        ]
    }
}

/// Whether numbers of 16 bits are looked up rather than computed.
#[inline(always)]
fn looks_up<M: Machine, E>() -> bool {
    M::V::LOOKS_UP && size_of::<E>() == 2
}

struct Dequantize<'r, M: Machine, E> {
    part: Quantized<E>,
    rows: usize,
    cols: usize,
    room: &'r mut Room<M>,
    out: *mut E,
}

impl<M: Machine, E: Element> Op<M> for Dequantize<'_, M, E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(mut self) {
        // SAFETY: as promised by the caller of `dequantize`.
        unsafe {
            match self.part.format {
                Format::Mxfp4 => self.mxfp4(),
                Format::Fp8 => self.fp8(),
            }
        }
    }
}

impl<M: Machine, E: Element> Dequantize<'_, M, E> {
    /// The bytes from one row of codes to that which is read next where the product goes on with the next rows.
    #[inline(always)]
    fn ahead(&self) -> usize {
        self.rows * self.part.row_bytes()
    }

    #[inline(always)]
    unsafe fn mxfp4(&self) {
        const AT_ONCE: usize = 2 * LINE / CHUNK;
        let Self { part, rows, cols, out, .. } = *self;
        assert!(
            part.column.is_multiple_of(CHUNK) && cols.is_multiple_of(CHUNK),
            "products take whole blocks"
        );
        let (tables, blocks, ahead) = (E::mxfp4_tables(), cols / CHUNK, self.ahead());
        for r in 0..rows {
            let scales = part.scales.wrapping_add(((part.row + r) * part.inner + part.column) / CHUNK);
            let (codes, out) = (part.codes(r, 0), out.wrapping_add(r * cols));
            let whole = blocks / AT_ONCE * AT_ONCE;
            // SAFETY: the weight has these blocks, `out` room for them.
            unsafe {
                for i in (0..whole).step_by(AT_ONCE) {
                    prefetch_l2(codes.wrapping_add(i * CHUNK / 2 + ahead));
                    for i in i..i + AT_ONCE {
                        Self::block(codes.add(i * CHUNK / 2), *scales.add(i), tables, out.add(i * CHUNK));
                    }
                }
                for i in whole..blocks {
                    Self::block(codes.add(i * CHUNK / 2), *scales.add(i), tables, out.add(i * CHUNK));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn block(codes: Ptr, scale: u8, tables: &Mxfp4Tables<E>, out: *mut E) {
        // SAFETY: there are 16 bytes of codes, and room for 32 numbers.
        unsafe {
            if looks_up::<M, E>() {
                let numbers = M::V::look_up_nibbles(codes, tables[usize::from(scale)].as_ptr().cast());
                numbers.store(out.cast());
            } else {
                let numbers = mxfp4_block(&codes.cast::<[u8; CHUNK / 2]>().read(), scale);
                out.cast::<[E; CHUNK]>().write_unaligned(numbers);
            }
        }
    }

    #[inline(always)]
    unsafe fn fp8(&mut self) {
        let Self { part, rows, cols, out, .. } = *self;
        let (across, ahead) = (part.inner.div_ceil(SQUARE), self.ahead());
        for (start, end) in pieces(part.row, rows) {
            let first = (part.row + start) / SQUARE * across + part.column / SQUARE;
            let scales = part.scales.cast::<f32>().wrapping_add(first);
            // SAFETY: as promised by the caller of `dequantize`.
            unsafe {
                let tables = self.room.tables::<E>(scales, pieces(part.column, cols).count());
                for r in start..end {
                    for (square, (from, to)) in pieces(part.column, cols).enumerate() {
                        let (codes, out) = (part.codes(r, from), out.add(r * cols + from));
                        prefetch_l2(codes.wrapping_add(ahead));
                        prefetch_l2(codes.wrapping_add(ahead + LINE));
                        let whole = (to - from) / CHUNK;
                        if looks_up::<M, E>() {
                            let table = tables.add(square * Room::<M>::TABLE);
                            let table = registers::<M, E>(table);
                            for i in 0..whole {
                                let numbers = M::V::look_up_bytes(codes.add(i * CHUNK), &table);
                                numbers.store(out.add(i * CHUNK).cast());
                            }
                        } else {
                            for i in 0..whole {
                                let codes = codes.add(i * CHUNK).cast::<[u8; CHUNK]>().read();
                                let out = out.add(i * CHUNK).cast::<[E; CHUNK]>();
                                out.write_unaligned(fp8_chunk(&codes, *scales.add(square)));
                            }
                        }
                        let (done, rest) = (whole * CHUNK, (to - from) % CHUNK);
                        if rest > 0 {
                            let mut some = [0; CHUNK];
                            std::ptr::copy_nonoverlapping(codes.add(done), some.as_mut_ptr(), rest);
                            let numbers = fp8_chunk::<E>(&some, *scales.add(square));
                            std::ptr::copy_nonoverlapping(numbers.as_ptr(), out.add(done), rest);
                        }
                    }
                }
            }
        }
    }
}

/// Where `count` rows or columns from `start` on are cut, that each piece lies in one square.
#[inline(always)]
fn pieces(start: usize, count: usize) -> impl Iterator<Item = (usize, usize)> {
    let first = SQUARE - start % SQUARE;
    let cuts = move |i: usize| if i == 0 { 0 } else { count.min(first + (i - 1) * SQUARE) };
    (0..(start + count).div_ceil(SQUARE) - start / SQUARE).map(move |i| (cuts(i), cuts(i + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codes::{decode, e4m3, e8m0};
    use crate::machine::*;
    use crate::simd::Array;
    use fastmoe_core::Float;
    use half::{bf16, f16};

    /// A weight of three experts with every code and awkward scales.
    fn weight(format: Format, rows: usize, inner: usize) -> (Vec<u8>, Vec<u8>) {
        let mut seed = 1u32;
        let mut random = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        };
        let numbers = 3 * rows * inner;
        match format {
            Format::Mxfp4 => {
                let codes = (0..numbers / 2).map(|_| random()).collect();
                (codes, (0..numbers / CHUNK).map(|_| random()).collect())
            }
            Format::Fp8 => {
                let codes = (0..numbers).map(|_| random()).collect();
                let squares = 3 * rows.div_ceil(SQUARE) * inner.div_ceil(SQUARE);
                let scales = (0..squares).flat_map(|i| (0.37 * (i as f32 - 2.0)).to_ne_bytes());
                (codes, scales.collect())
            }
        }
    }

    /// One number of such a weight.
    fn number(
        format: Format,
        codes: &[u8],
        scales: &[u8],
        [expert, rows, inner]: [usize; 3],
        r: usize,
        c: usize,
    ) -> f32 {
        let at = (expert * rows + r) * inner + c;
        match format {
            Format::Mxfp4 => {
                decode::<4, 1>(u32::from(codes[at / 2] >> (at % 2 * 4) & 15)) * e8m0(scales[at / CHUNK])
            }
            Format::Fp8 => {
                let (down, across) = (rows.div_ceil(SQUARE), inner.div_ceil(SQUARE));
                let square = (expert * down + r / SQUARE) * across + c / SQUARE;
                let scale = scales[4 * square..][..4].try_into().unwrap();
                e4m3(codes[at]) * f32::from_ne_bytes(scale)
            }
        }
    }

    fn check<M: Machine, E: Element<Acc = M::Acc>>() {
        let cases = [
            (Format::Mxfp4, 7, 96, [0, 0, 7, 96]),
            (Format::Mxfp4, 9, 128, [3, 32, 5, 64]),
            (Format::Fp8, 300, 290, [0, 0, 300, 290]),
            (Format::Fp8, 300, 290, [100, 64, 180, 200]),
            (Format::Fp8, 130, 1, [128, 0, 2, 1]),
            (Format::Fp8, 256, 256, [128, 128, 128, 128]),
        ];
        for (format, n, inner, [row, column, rows, cols]) in cases {
            let (codes, scales) = weight(format, n, inner);
            let part = Quantized::<E>::new(format, codes.as_ptr(), scales.as_ptr(), [2, n, inner]);
            let part = part.skip(row).column(column);
            let mut room = Room::<M>::new(&part, rows, cols);
            // SAFETY: the weight has these rows and columns, and the machine is one of this computer. The second time has
            // the tables of the first.
            let numbers = unsafe {
                part.dequantize(rows, cols, &mut room);
                std::slice::from_raw_parts(part.dequantize(rows, cols, &mut room).start, rows * cols)
            };
            for (i, &out) in numbers.iter().enumerate() {
                let want = number(format, &codes, &scales, [2, n, inner], row + i / cols, column + i % cols);
                let (mut got, mut rounded) = ([E::Acc::default()], [E::default()]);
                E::from_f32(&[want], &mut rounded);
                let mut want = got;
                // SAFETY: the portable register is of any machine.
                unsafe {
                    E::widen::<Array<f32, 4>>(&[out], &mut got);
                    E::widen::<Array<f32, 4>>(&rounded, &mut want);
                }
                let name = std::any::type_name::<(M, E)>();
                let same = got == want || (got[0].is_nan() && want[0].is_nan());
                assert!(same, "{format:?} {i} of {rows} x {cols}, {name}");
            }
        }
    }

    #[test]
    fn every_machine_makes_the_same_numbers() {
        check::<Portable, f32>();
        check::<Portable, bf16>();
        check::<Portable, f16>();
        check::<Portable64, f64>();
        #[cfg(target_arch = "x86_64")]
        for isa in crate::isa::Isa::available() {
            use crate::isa::Isa;
            match isa {
                Isa::Avx2 => {
                    check::<Avx2, f32>();
                    check::<Avx2, bf16>();
                    check::<Avx2, f16>();
                    check::<Avx2Double, f64>();
                }
                Isa::Avx512 => {
                    check::<Avx512, f32>();
                    check::<Avx512, bf16>();
                    check::<Avx512, f16>();
                }
                Isa::Avx512Bf16 => check::<Avx512Pairs, bf16>(),
                _ => (),
            }
        }
    }
}
