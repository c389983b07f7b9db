//! The tensor element types of the backend, and how numbers enter and leave them.

use crate::codes::{Mxfp4Tables, mxfp4_tables};
use crate::machine::TileUpdate;
use crate::math::Real;
use crate::simd::Vector;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::sync::LazyLock;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

/// A number stored in a tensor; sums are kept in `Acc`.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// The type of sums over this element.
    type Acc: Real;
    /// The element is itself the type of sums.
    const WIDE: bool = false;
    /// How sums are written as this element past the caches, where `Machine::ends_in` it.
    const STREAM: TileUpdate;

    /// Converts a slice to the type of sums; both slices have one length.
    ///
    /// # Safety
    /// Reached only from code compiled for the instruction set of `V`.
    unsafe fn widen<V: Vector>(src: &[Self], dst: &mut [Self::Acc]);
    /// Rounds a slice of sums to nearest even; both slices have one length.
    ///
    /// # Safety
    /// As `widen`.
    unsafe fn narrow<V: Vector>(src: &[Self::Acc], dst: &mut [Self]);
    /// `narrow`, of f32 whatever the type of sums is, on any machine.
    fn from_f32(src: &[f32], dst: &mut [Self]);
    /// All numbers of MXFP4.
    fn mxfp4_tables() -> &'static Mxfp4Tables<Self>;

    /// One register of units: numbers widened to the lane, or bf16 pairs as they are.
    ///
    /// # Safety
    /// `p` is valid for the elements of a register, and the instruction set is that of `V`.
    unsafe fn load<V: Vector, const PAIRS: bool>(p: *const Self) -> V;

    /// `load` of the first `n` elements, zeros after them.
    ///
    /// # Safety
    /// As `load`, with `p` valid for `n` elements.
    #[inline(always)]
    unsafe fn load_some<V: Vector, const PAIRS: bool>(p: *const Self, n: usize) -> V {
        let mut buffer = [Self::default(); 32];
        // SAFETY: n is at most a register's elements, of which no register has more than 32.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load::<V, PAIRS>(buffer.as_ptr())
        }
    }
}

/// Made when first asked for.
macro_rules! tables {
    ($number:ty) => {
        fn mxfp4_tables() -> &'static Mxfp4Tables<Self> {
            static TABLES: LazyLock<Box<Mxfp4Tables<$number>>> = LazyLock::new(mxfp4_tables);
            &TABLES
        }
    };
}

macro_rules! native_element {
    ($float:ty) => {
        impl Element for $float {
            type Acc = $float;
            const WIDE: bool = true;
            const STREAM: TileUpdate = TileUpdate::Stream;
            #[inline(always)]
            unsafe fn widen<V: Vector>(src: &[Self], dst: &mut [Self]) {
                dst.copy_from_slice(src);
            }
            #[inline(always)]
            unsafe fn narrow<V: Vector>(src: &[Self], dst: &mut [Self]) {
                dst.copy_from_slice(src);
            }
            #[inline(always)]
            fn from_f32(src: &[f32], dst: &mut [Self]) {
                for (d, &s) in dst.iter_mut().zip(src) {
                    *d = s.into();
                }
            }
            tables!($float);
            #[inline(always)]
            unsafe fn load<V: Vector, const PAIRS: bool>(p: *const Self) -> V {
                // SAFETY: as promised by the caller; the lanes of V are of this type.
                unsafe { V::load(p.cast()) }
            }
        }
    };
}
native_element!(f32);
native_element!(f64);

impl Element for bf16 {
    type Acc = f32;
    const STREAM: TileUpdate = TileUpdate::StreamBf16;
    #[inline(always)]
    unsafe fn widen<V: Vector>(src: &[Self], dst: &mut [f32]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = f32::from_bits(u32::from(s.to_bits()) << 16);
        }
    }
    #[inline(always)]
    unsafe fn narrow<V: Vector>(src: &[f32], dst: &mut [Self]) {
        <Self as Element>::from_f32(src, dst);
    }
    #[inline(always)]
    fn from_f32(src: &[f32], dst: &mut [Self]) {
        for (d, s) in dst.iter_mut().zip(src) {
            let bits = s.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
            let quiet_nan = bits | 0x0040_0000;
            // Branch-free, so that the loop becomes vector code.
            *d = Self::from_bits(((if s.is_nan() { quiet_nan } else { rounded }) >> 16) as u16);
        }
    }
    tables!(bf16);
    #[inline(always)]
    unsafe fn load<V: Vector, const PAIRS: bool>(p: *const Self) -> V {
        // SAFETY: as promised by the caller.
        unsafe { if PAIRS { V::load(p.cast()) } else { V::widen_bf16(p) } }
    }
}

impl Element for f16 {
    type Acc = f32;
    const STREAM: TileUpdate = TileUpdate::StreamF16;
    #[inline(always)]
    unsafe fn widen<V: Vector>(src: &[Self], dst: &mut [f32]) {
        let whole = if V::CONVERTS_F16 { src.len() / V::LANES * V::LANES } else { 0 };
        for i in (0..whole).step_by(V::LANES) {
            // SAFETY: as promised by the caller; both slices have a register of numbers there.
            unsafe { V::widen_f16(&raw const src[i]).store((&raw mut dst[i]).cast()) }
        }
        src[whole..].convert_to_f32_slice(&mut dst[whole..]);
    }
    #[inline(always)]
    unsafe fn narrow<V: Vector>(src: &[f32], dst: &mut [Self]) {
        let step = 2 * V::LANES;
        let whole = if V::CONVERTS_F16 { src.len() / step * step } else { 0 };
        for i in (0..whole).step_by(step) {
            // SAFETY: as promised by the caller; both slices have two registers of numbers there.
            unsafe {
                let pair =
                    [V::load((&raw const src[i]).cast()), V::load((&raw const src[i + V::LANES]).cast())];
                V::round_to_f16(pair).store((&raw mut dst[i]).cast());
            }
        }
        dst[whole..].convert_from_f32_slice(&src[whole..]);
    }
    #[inline(always)]
    fn from_f32(src: &[f32], dst: &mut [Self]) {
        dst.convert_from_f32_slice(src);
    }
    tables!(f16);
    #[inline(always)]
    unsafe fn load<V: Vector, const PAIRS: bool>(p: *const Self) -> V {
        // SAFETY: as promised by the caller.
        unsafe { V::widen_f16(p) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Array;

    /// Every number of IEEE half, and numbers between them, in slices that fill no whole registers.
    fn check<V: Vector>() {
        let numbers: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for numbers in numbers.chunks(149) {
            let mut wide = vec![0.0; numbers.len()];
            // SAFETY: the caller has the instruction set of V.
            unsafe { f16::widen::<V>(numbers, &mut wide) };
            for (number, wide) in numbers.iter().zip(&wide) {
                let wanted = number.to_f32();
                assert!(
                    wanted.to_bits() == wide.to_bits() || (wanted.is_nan() && wide.is_nan()),
                    "{number:?}"
                );
            }
            for nudge in [-1, 0, 1, 1 << 11, 1 << 12, 1 << 13] {
                let wide: Vec<f32> =
                    wide.iter().map(|x| f32::from_bits(x.to_bits().wrapping_add_signed(nudge))).collect();
                let mut narrow = vec![f16::ZERO; wide.len()];
                // SAFETY: the caller has the instruction set of V.
                unsafe { f16::narrow::<V>(&wide, &mut narrow) };
                for (wide, narrow) in wide.iter().zip(narrow) {
                    let wanted = f16::from_f32(*wide);
                    let same = wanted.to_bits() == narrow.to_bits() || (wanted.is_nan() && narrow.is_nan());
                    assert!(same, "{wide:?} to {narrow:?}, wanted {wanted:?}");
                }
            }
        }
    }

    #[test]
    fn half_is_converted_as_the_standard_says() {
        check::<Array<f32, 4>>();
        #[cfg(target_arch = "x86_64")]
        {
            use crate::isa::Isa;
            let available = Isa::available();
            if available.contains(&Isa::Avx2) {
                check::<crate::simd::F32x8>();
            }
            if available.contains(&Isa::Avx512) {
                check::<crate::simd::F32x16>();
            }
        }
    }
}
