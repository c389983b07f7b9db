//! What the codes and scales of quantized weights mean, and tables of it.

use crate::dtype::Element;

/// Numbers along the contraction that share a scale in MXFP4, and that are made at a time in either format.
pub const CHUNK: usize = 32;

/// The 16 numbers of E2M1 by each of the 256 scales of E8M0.
pub type Mxfp4Tables<E> = [[E; 16]; 256];

/// The number of a code of a sign, an exponent and so many bits of mantissa; the lowest exponent is that of subnormals.
#[inline(always)]
pub fn decode<const BITS: u32, const MANTISSA: u32>(code: u32) -> f32 {
    let bias = (1 << (BITS - 2 - MANTISSA)) - 1;
    let magnitude = code & ((1 << (BITS - 1)) - 1);
    let normal = f32::from_bits((magnitude << (23 - MANTISSA)) + ((127 - bias) << 23));
    let subnormal = normal + normal - f32::from_bits((128 - bias) << 23);
    let value = if magnitude >> MANTISSA == 0 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | (code >> (BITS - 1)) << 31)
}

/// E4M3 without infinities: all ones are NaN.
#[inline(always)]
pub fn e4m3(code: u8) -> f32 {
    if code & 0x7f == 0x7f { f32::NAN } else { decode::<8, 3>(code.into()) }
}

/// A power of two, or NaN.
#[inline(always)]
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Sixteen bytes of MXFP4, the low half of each first.
#[inline(always)]
pub fn mxfp4_block<E: Element>(codes: &[u8; CHUNK / 2], scale: u8) -> [E; CHUNK] {
    let (mut numbers, mut out) = ([0.0; CHUNK], [E::default(); CHUNK]);
    let scale = e8m0(scale);
    for i in 0..CHUNK / 2 {
        let code = u32::from(codes[i]);
        numbers[2 * i] = decode::<4, 1>(code & 15) * scale;
        numbers[2 * i + 1] = decode::<4, 1>(code >> 4) * scale;
    }
    E::from_f32(&numbers, &mut out);
    out
}

/// Codes of FP8 by their scale.
#[inline(always)]
pub fn fp8_chunk<E: Element>(codes: &[u8; CHUNK], scale: f32) -> [E; CHUNK] {
    let (mut numbers, mut out) = ([0.0; CHUNK], [E::default(); CHUNK]);
    for i in 0..CHUNK {
        numbers[i] = e4m3(codes[i]) * scale;
    }
    E::from_f32(&numbers, &mut out);
    out
}

/// The numbers of the codes that are not negative.
#[inline(always)]
pub fn fp8_table<E: Element>(scale: f32, out: &mut [E]) {
    for (i, out) in out.as_chunks_mut::<CHUNK>().0.iter_mut().enumerate() {
        *out = fp8_chunk(&std::array::from_fn(|j| (i * CHUNK + j) as u8), scale);
    }
}

/// `Mxfp4Tables` of a type.
pub fn mxfp4_tables<E: Element>() -> Box<Mxfp4Tables<E>> {
    let codes = std::array::from_fn(|i| ((2 * i as u8) & 15) | ((2 * i as u8 + 1) << 4));
    Box::new(std::array::from_fn(|scale| {
        let numbers = mxfp4_block(&codes, scale as u8);
        std::array::from_fn(|i| numbers[i])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
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
}
