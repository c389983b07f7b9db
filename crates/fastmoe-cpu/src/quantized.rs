//! Quantized weights: small codes with a scale for each block of them, of which a product makes numbers a block at
//! a time, just before it reads them.

use crate::dtype::Element;
use crate::machine::{Machine, Op};
use crate::prefetch::Prefetch;
use crate::problem::{Format, Ptr};
use crate::simd::{Vector, prefetch_l2};
use std::marker::PhantomData;
use std::ops::Range;

/// Numbers along the contraction that share a scale in MXFP4, and that are made at a time in either format.
pub const CHUNK: usize = 32;
/// Rows and columns that share a scale in FP8.
const SQUARE: usize = 128;
/// Bytes of a cache line.
const LINE: usize = 64;

/// The 16 numbers of E2M1 by each of the 256 scales of E8M0.
pub type Mxfp4Tables<E> = [[E; 16]; 256];

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

    /// Writes `rows x cols` numbers, one row after the other.
    ///
    /// # Safety
    /// Reached only from code compiled for the machine; the weight has these rows and columns, `out` room for them.
    #[inline(always)]
    pub unsafe fn dequantize<M: Machine>(&self, rows: usize, cols: usize, out: *mut E) {
        // SAFETY: as promised by the caller.
        unsafe { M::call(Dequantize { part: *self, rows, cols, out }) }
    }
}

struct Dequantize<E> {
    part: Quantized<E>,
    rows: usize,
    cols: usize,
    out: *mut E,
}

impl<M: Machine, E: Element> Op<M> for Dequantize<E> {
    type Out = ();
    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: as promised by the caller of `dequantize`.
        unsafe {
            match self.part.format {
                Format::Mxfp4 => self.mxfp4::<M>(),
                Format::Fp8 => self.fp8::<M>(),
            }
        }
    }
}

impl<E: Element> Dequantize<E> {
    #[inline(always)]
    unsafe fn mxfp4<M: Machine>(&self) {
        let Self { part, rows, cols, out } = *self;
        assert!(
            part.column.is_multiple_of(CHUNK) && cols.is_multiple_of(CHUNK),
            "products take whole blocks"
        );
        let tables = E::mxfp4_tables();
        // The codes that the next call reads, where it goes on with the next rows.
        let ahead = rows * part.row_bytes();
        for r in 0..rows {
            let scales = part.scales.wrapping_add(((part.row + r) * part.inner + part.column) / CHUNK);
            let (codes, out) = (part.codes(r, 0), out.wrapping_add(r * cols));
            for i in 0..cols / CHUNK {
                // SAFETY: the weight has this block, `out` room for it.
                unsafe {
                    let block = codes.add(i * CHUNK / 2);
                    if (i * CHUNK / 2).is_multiple_of(LINE) {
                        prefetch_l2(block.wrapping_add(ahead));
                    }
                    let (scale, out) = (*scales.add(i), out.add(i * CHUNK));
                    if M::V::LOOKS_UP && size_of::<E>() == 2 {
                        M::V::look_up_nibbles(block, tables[usize::from(scale)].as_ptr().cast(), out.cast());
                    } else {
                        out.cast::<[E; CHUNK]>()
                            .write_unaligned(mxfp4_block(&block.cast::<[u8; CHUNK / 2]>().read(), scale));
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn fp8<M: Machine>(&self) {
        let Self { part, rows, cols, .. } = *self;
        for (start, end) in pieces(part.row, rows) {
            for (from, to) in pieces(part.column, cols) {
                let across = part.inner.div_ceil(SQUARE);
                let square = (part.row + start) / SQUARE * across + (part.column + from) / SQUARE;
                // SAFETY: as promised by the caller of `dequantize`.
                unsafe {
                    let scale = *part.scales.cast::<f32>().add(square);
                    self.square::<M>(start..end, from..to, scale);
                }
            }
        }
    }

    /// Rows and columns that share a scale.
    #[inline(always)]
    unsafe fn square<M: Machine>(&self, rows: Range<usize>, cols: Range<usize>, scale: f32) {
        let looks_up = M::V::LOOKS_UP && size_of::<E>() == 2;
        // The numbers that are not negative.
        let mut table = [[E::default(); CHUNK]; 4];
        if looks_up {
            for (i, numbers) in table.iter_mut().enumerate() {
                *numbers = fp8_chunk(&std::array::from_fn(|j| (i * CHUNK + j) as u8), scale);
            }
        }
        let ahead = self.rows * self.part.row_bytes();
        for r in rows {
            for c in cols.clone().step_by(LINE) {
                prefetch_l2(self.part.codes(r, c).wrapping_add(ahead));
            }
            for c in cols.clone().step_by(CHUNK) {
                let n = CHUNK.min(cols.end - c);
                // SAFETY: as promised by the caller of `dequantize`: there are n codes, and room for as many numbers.
                unsafe {
                    let (codes, out) = (self.part.codes(r, c), self.out.add(r * self.cols + c));
                    if n < CHUNK {
                        let mut some = [0; CHUNK];
                        std::ptr::copy_nonoverlapping(codes, some.as_mut_ptr(), n);
                        std::ptr::copy_nonoverlapping(fp8_chunk(&some, scale).as_ptr(), out, n);
                    } else if looks_up {
                        M::V::look_up_bytes(codes, table.as_ptr().cast(), out.cast());
                    } else {
                        out.cast::<[E; CHUNK]>()
                            .write_unaligned(fp8_chunk(&codes.cast::<[u8; CHUNK]>().read(), scale));
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

/// The number of a code of a sign, an exponent and so many bits of mantissa; the lowest exponent is that of subnormals.
#[inline(always)]
fn decode<const BITS: u32, const MANTISSA: u32>(code: u32) -> f32 {
    let bias = (1 << (BITS - 2 - MANTISSA)) - 1;
    let magnitude = code & ((1 << (BITS - 1)) - 1);
    let normal = f32::from_bits((magnitude << (23 - MANTISSA)) + ((127 - bias) << 23));
    let subnormal = normal + normal - f32::from_bits((128 - bias) << 23);
    let value = if magnitude >> MANTISSA == 0 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | (code >> (BITS - 1)) << 31)
}

/// E4M3 without infinities: all ones are NaN.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    if code & 0x7f == 0x7f { f32::NAN } else { decode::<8, 3>(code.into()) }
}

/// A power of two, or NaN.
#[inline(always)]
fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Sixteen bytes of MXFP4, the low half of each first.
#[inline(always)]
fn mxfp4_block<E: Element>(codes: &[u8; CHUNK / 2], scale: u8) -> [E; CHUNK] {
    let (mut numbers, mut out) = ([0.0; CHUNK], [E::default(); CHUNK]);
    let scale = e8m0(scale);
    for (pair, &code) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        *pair = [u32::from(code) & 15, u32::from(code) >> 4].map(|code| decode::<4, 1>(code) * scale);
    }
    E::from_f32(&numbers, &mut out);
    out
}

#[inline(always)]
fn fp8_chunk<E: Element>(codes: &[u8; CHUNK], scale: f32) -> [E; CHUNK] {
    let (mut numbers, mut out) = ([0.0; CHUNK], [E::default(); CHUNK]);
    for (number, &code) in numbers.iter_mut().zip(codes) {
        *number = e4m3(code) * scale;
    }
    E::from_f32(&numbers, &mut out);
    out
}

/// `Mxfp4Tables` of a type.
pub fn mxfp4_tables<E: Element>() -> Box<Mxfp4Tables<E>> {
    let codes = std::array::from_fn(|i| (2 * i as u8 & 15) | (2 * i as u8 + 1) << 4);
    Box::new(std::array::from_fn(|scale| {
        let numbers = mxfp4_block(&codes, scale as u8);
        std::array::from_fn(|i| numbers[i])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::*;
    use half::{bf16, f16};

    /// Sign, exponent and mantissa of a code, by the definition of a float.
    fn by_definition(code: u8, bits: i32, mantissa: i32, bias: i32) -> f64 {
        let code = i32::from(code);
        let (sign, exponent) = (code >> (bits - 1), code >> mantissa & ((1 << (bits - 1 - mantissa)) - 1));
        let fraction = f64::from(code & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
        let size = if exponent == 0 {
            fraction * 2f64.powi(1 - bias)
        } else {
            (1.0 + fraction) * 2f64.powi(exponent - bias)
        };
        if sign == 1 { -size } else { size }
    }

    #[test]
    fn every_code_of_e2m1() {
        let numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for code in 0..16u8 {
            let number = decode::<4, 1>(code.into());
            assert_eq!(f64::from(number), by_definition(code, 4, 1, 1));
            assert_eq!(number.abs(), numbers[usize::from(code & 7)]);
            assert_eq!(number.is_sign_negative(), code > 7);
        }
    }

    #[test]
    fn every_code_of_e4m3() {
        for code in 0..=255u8 {
            if code & 0x7f == 0x7f {
                assert!(e4m3(code).is_nan());
            } else {
                assert_eq!(f64::from(e4m3(code)), by_definition(code, 8, 3, 7));
                assert_eq!(e4m3(code).is_sign_negative(), code > 127);
            }
        }
        assert_eq!((e4m3(0x7e), e4m3(1)), (448.0, 2f32.powi(-9)));
    }

    #[test]
    fn every_code_of_e8m0() {
        for code in 0..255u8 {
            assert_eq!(f64::from(e8m0(code)), 2f64.powi(i32::from(code) - 127));
        }
        assert!(e8m0(255).is_nan());
    }

    #[test]
    fn tables_have_what_the_codes_mean() {
        let (bf, half) = (bf16::mxfp4_tables(), f16::mxfp4_tables());
        for scale in 0..=255u8 {
            for code in 0..16u8 {
                let number = decode::<4, 1>(code.into()) * e8m0(scale);
                let at = (usize::from(scale), usize::from(code));
                assert_eq!(bf[at.0][at.1].to_bits(), bf16::from_f32(number).to_bits(), "{at:?}");
                assert_eq!(half[at.0][at.1].to_bits(), f16::from_f32(number).to_bits(), "{at:?}");
            }
        }
    }

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

    fn check<M: Machine, E: Element>() {
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
            let mut out = vec![E::default(); rows * cols];
            // SAFETY: the weight has these rows and columns, and the machine is one of this computer.
            unsafe { part.skip(row).column(column).dequantize::<M>(rows, cols, out.as_mut_ptr()) };
            for (i, out) in out.into_iter().enumerate() {
                let want = number(format, &codes, &scales, [2, n, inner], row + i / cols, column + i % cols);
                let (mut got, mut rounded) = ([E::Acc::default()], [E::default()]);
                E::from_f32(&[want], &mut rounded);
                let mut want = got;
                E::widen(&[out], &mut got);
                E::widen(&rounded, &mut want);
                let name = std::any::type_name::<(M, E)>();
                let same = got == want || (got[0] != got[0] && want[0] != want[0]);
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
