//! Four lanes of NEON.

use super::Vector;
use half::{bf16, f16};
use std::arch::aarch64::*;

/// A NEON register of f32.
#[derive(Clone, Copy)]
pub struct F32x4(float32x4_t);

// SAFETY: NEON is part of every aarch64 target.
unsafe impl Vector for F32x4 {
    type Cell = f32;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: see the impl.
        Self(unsafe { vdupq_n_f32(0.0) })
    }
    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { vdupq_n_f32(*p) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the impl.
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { vaddq_f32(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see the impl.
        Self(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the impl.
        unsafe { vaddvq_f32(self.0) }
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut [Self]) {
        // SAFETY: see the impl.
        unsafe {
            let (a, b) = (vtrnq_f32(rows[0].0, rows[1].0), vtrnq_f32(rows[2].0, rows[3].0));
            rows[0] = Self(vcombine_f32(vget_low_f32(a.0), vget_low_f32(b.0)));
            rows[1] = Self(vcombine_f32(vget_low_f32(a.1), vget_low_f32(b.1)));
            rows[2] = Self(vcombine_f32(vget_high_f32(a.0), vget_high_f32(b.0)));
            rows[3] = Self(vcombine_f32(vget_high_f32(a.1), vget_high_f32(b.1)));
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(p: *const bf16) -> Self {
        // SAFETY: see the impl; a bf16 is the upper half of an f32.
        Self(unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn widen_f16(p: *const f16) -> Self {
        let wide: [f32; 4] = std::array::from_fn(|i| {
            // SAFETY: the caller's pointer is valid for four numbers.
            unsafe { (*p.add(i)).to_f32() }
        });
        // SAFETY: see the impl.
        Self(unsafe { vld1q_f32(wide.as_ptr()) })
    }
}
