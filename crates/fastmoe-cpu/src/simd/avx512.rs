//! Sixteen lanes of AVX-512, with bf16 dot products where the kernel asks for them.

use super::Vector;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// An AVX-512 register of f32, or of bf16 pairs.
#[derive(Clone, Copy)]
pub struct F32x16(__m512);

// SAFETY: reached only from functions compiled for AVX-512 F, BW, VL and DQ (and BF16 for what rounds or multiplies bf16).
unsafe impl Vector for F32x16 {
    type Cell = f32;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_setzero_ps() })
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_set1_ps(*p) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_past_caches(self, p: *mut f32) {
        // SAFETY: see the impl.
        unsafe { _mm512_stream_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn round_to_bf16([low, high]: [Self; 2]) -> Self {
        // SAFETY: see the impl; the bits of a register are those of any other.
        Self(unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high.0, low.0)) })
    }
    const CONVERTS_F16: bool = true;
    #[inline(always)]
    unsafe fn round_to_f16([low, high]: [Self; 2]) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let low = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low.0);
            let high = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high.0);
            Self(_mm512_castsi512_ps(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)))
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the impl.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn sum_four([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        // SAFETY: see the impl. Every 128 bits become the sums of a, b, c and d in them.
        unsafe {
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a.0, b.0), _mm512_unpackhi_ps(a.0, b.0));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c.0, d.0), _mm512_unpackhi_ps(c.0, d.0));
            let all = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
            let sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self]) {
        // SAFETY: see the impl. Pairs of rows, then 4 x 4 blocks within 128 bits, then the blocks.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                r[i] = rows[i].0;
            }
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..4 {
                u[4 * i] = _mm512_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 1] = _mm512_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
                u[4 * i + 2] = _mm512_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
                u[4 * i + 3] = _mm512_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
            }
            for i in 0..4 {
                let a = _mm512_shuffle_f32x4::<0x88>(u[i], u[4 + i]);
                let b = _mm512_shuffle_f32x4::<0xdd>(u[i], u[4 + i]);
                let c = _mm512_shuffle_f32x4::<0x88>(u[8 + i], u[12 + i]);
                let d = _mm512_shuffle_f32x4::<0xdd>(u[8 + i], u[12 + i]);
                rows[i] = Self(_mm512_shuffle_f32x4::<0x88>(a, c));
                rows[8 + i] = Self(_mm512_shuffle_f32x4::<0xdd>(a, c));
                rows[4 + i] = Self(_mm512_shuffle_f32x4::<0x88>(b, d));
                rows[12 + i] = Self(_mm512_shuffle_f32x4::<0xdd>(b, d));
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl; a pair register is 32 bf16 numbers.
        unsafe {
            let (a, b) = (_mm512_castps_si512(a.0), _mm512_castps_si512(b.0));
            Self(_mm512_dpbf16_ps(
                self.0,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            ))
        }
    }
    #[inline(always)]
    unsafe fn split<const PLANES: usize>(self) -> [Self; 3] {
        // SAFETY: see the impl.
        let [high, middle, low] = unsafe { if PLANES == 2 { in_two(self.0) } else { in_three(self.0) } };
        [Self(high), Self(middle), Self(low)]
    }
    #[inline(always)]
    unsafe fn pair(self, high: Self) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let (low, high) = (_mm512_castps_si512(self.0), _mm512_castps_si512(high.0));
            let upper = _mm512_set1_epi32(UPPER);
            let low = _mm512_srli_epi32::<16>(low);
            Self(_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_and_si512(high, upper))))
        }
    }
    #[inline(always)]
    unsafe fn zip(a: *const bf16, b: *const bf16) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.cast()));
            let hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b.cast()));
            Self(_mm512_castsi512_ps(_mm512_or_si512(lo, _mm512_slli_epi32::<16>(hi))))
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(p: *const bf16) -> Self {
        // SAFETY: see the impl.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn widen_f16(p: *const f16) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }

    const LOOKS_UP: bool = true;
    #[inline(always)]
    unsafe fn look_up_nibbles(codes: *const u8, table: *const u16) -> Self {
        // SAFETY: see the impl. The table is there twice, so that of an index 4 bits count: those of the low half, and
        // of the high one in the word above it.
        unsafe {
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(table.cast()));
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
            let halves = _mm512_or_si512(bytes, _mm512_slli_epi32::<12>(bytes));
            Self(_mm512_castsi512_ps(_mm512_permutexvar_epi16(halves, table)))
        }
    }
    #[inline(always)]
    unsafe fn look_up_bytes(codes: *const u8, table: &[Self; 4]) -> Self {
        // SAFETY: see the impl. Each half of the table is picked from by 6 bits, between the two by the one above them.
        unsafe {
            let [a, b, c, d] = [table[0].0, table[1].0, table[2].0, table[3].0];
            let (low, high) = (
                [_mm512_castps_si512(a), _mm512_castps_si512(b)],
                [_mm512_castps_si512(c), _mm512_castps_si512(d)],
            );
            let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.cast()));
            let upper = _mm512_movepi16_mask(_mm512_slli_epi16::<9>(bytes));
            let small = _mm512_permutex2var_epi16(low[0], bytes, low[1]);
            let large = _mm512_permutex2var_epi16(high[0], bytes, high[1]);
            let sign = _mm512_and_si512(_mm512_slli_epi16::<8>(bytes), _mm512_set1_epi16(i16::MIN));
            let words = _mm512_xor_si512(_mm512_mask_blend_epi16(upper, small, large), sign);
            Self(_mm512_castsi512_ps(words))
        }
    }
}

/// The bits of an f32 that are a bf16.
const UPPER: i32 = 0xffff_0000_u32.cast_signed();

/// Two numbers of one sign, neither of them zero but of zero: an infinite one times a finite number stays infinite then.
///
/// # Safety
/// Reached only from code compiled for AVX-512.
#[inline(always)]
unsafe fn in_two(x: __m512) -> [__m512; 3] {
    // SAFETY: as promised by the caller.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let not_zero = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(i32::MAX));
        let below = _mm512_sub_epi32(bits, _mm512_set1_epi32(1));
        let high = _mm512_castsi512_ps(_mm512_maskz_and_epi32(not_zero, below, _mm512_set1_epi32(UPPER)));
        [high, nearest(_mm512_sub_ps(x, high)), _mm512_setzero_ps()]
    }
}

/// Three numbers whose sum is `x`. What is infinite or not a number is so in the last one alone, which a product multiplies
/// with the first only.
///
/// # Safety
/// As `in_two`.
#[inline(always)]
unsafe fn in_three(x: __m512) -> [__m512; 3] {
    const LARGEST: u32 = 0x7f7f_0000;
    const INFINITIES: i32 = 0x18;
    const SMALLER_WITH_SIGN: i32 = 0b0010;
    const SIGN_OR_ONE: i32 = 0xea;
    // SAFETY: as promised by the caller.
    unsafe {
        let infinite = _mm512_fpclass_ps_mask::<INFINITIES>(x);
        let largest = _mm512_set1_ps(f32::from_bits(LARGEST));
        let high = _mm512_castps_si512(nearest(_mm512_range_ps::<SMALLER_WITH_SIGN>(x, largest)));
        let (sign, one) = (_mm512_set1_epi32(i32::MIN), _mm512_castps_si512(_mm512_set1_ps(1.0)));
        let high = _mm512_mask_ternarylogic_epi32::<SIGN_OR_ONE>(high, infinite, sign, one);
        let high = _mm512_castsi512_ps(high);
        let rest = _mm512_sub_ps(x, high);
        let middle = _mm512_maskz_mov_ps(!infinite, nearest(rest));
        [high, middle, _mm512_sub_ps(rest, middle)]
    }
}

/// The nearest numbers of bf16.
///
/// # Safety
/// As `in_two`.
#[inline(always)]
unsafe fn nearest(x: __m512) -> __m512 {
    // SAFETY: as promised by the caller.
    unsafe {
        let half = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
        _mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(UPPER)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// The planes of 16 numbers, each as a lane.
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn planes<const PLANES: usize>(numbers: &[f32; 16]) -> [[f32; 16]; 3] {
        let mut out = [[0.0; 16]; 3];
        // SAFETY: the arrays have the lanes of a register; the caller has the instruction set.
        unsafe {
            for (plane, out) in F32x16::load(numbers.as_ptr()).split::<PLANES>().iter().zip(&mut out) {
                plane.store(out.as_mut_ptr());
            }
        }
        out
    }

    fn check<const PLANES: usize>(numbers: &[f32]) {
        for some in numbers.chunks(16) {
            let mut padded = [0.0; 16];
            padded[..some.len()].copy_from_slice(some);
            // SAFETY: the only test of this asks for the instruction set.
            let planes = unsafe { planes::<PLANES>(&padded) };
            for (i, number) in padded.iter().enumerate() {
                let parts = [planes[0][i], planes[1][i], planes[2][i]];
                let sum = parts[2] + parts[1] + parts[0];
                assert!(sum == *number || (sum.is_nan() && number.is_nan()), "{number:?} as {parts:?}");
                if number.is_finite() {
                    let narrow = parts.iter().all(|part| part.to_bits() & 0xffff == 0);
                    assert!(narrow, "{number:?} as {parts:?}");
                }
            }
        }
    }

    #[test]
    fn numbers_are_the_sums_of_their_planes() {
        if !Isa::available().contains(&Isa::Avx512Bf16) {
            return;
        }
        let halves: Vec<f32> = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect();
        check::<2>(&halves);
        check::<3>(&halves);
        let smallest = f32::from_bits(24 << 23);
        let numbers: Vec<f32> = (0..u32::MAX - 65521)
            .step_by(65521)
            .map(f32::from_bits)
            .chain([f32::MAX, f32::MIN, f32::from_bits(0x7f7f_8000), f32::from_bits(0x7fff_ffff)])
            .filter(|x| x.is_nan() || x.abs() >= smallest)
            .collect();
        check::<3>(&numbers);
    }
}
