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
