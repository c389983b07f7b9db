//! One SIMD register behind a trait, so that every kernel is written once.
//!
//! The functions are `#[inline(always)]` and are only reached from `#[target_feature]` functions of the
//! instruction set that the register belongs to (see `machine.rs`). Never call them from a closure: it is
//! compiled on its own, without the instruction set, and every operation in it becomes a function call.

mod array;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

pub use array::Array;
#[cfg(target_arch = "x86_64")]
pub use avx2::F32x8;
#[cfg(target_arch = "x86_64")]
pub use avx512::F32x16;
#[cfg(target_arch = "aarch64")]
pub use neon::F32x4;

use half::{bf16, f16};

/// A register of accumulator lanes.
///
/// A lane holds one `Cell`, or, as an operand of `dot_pairs`, two bf16 numbers in its 32 bits.
///
/// # Safety
/// Every function needs the instruction set of the implementing register; pointers must be valid for the
/// lanes that are read or written.
#[allow(clippy::missing_safety_doc)]
pub unsafe trait Vector: Copy {
    /// The number in a lane.
    type Cell: Copy;
    /// Lanes of the register.
    const LANES: usize;

    unsafe fn zero() -> Self;
    unsafe fn splat(p: *const Self::Cell) -> Self;
    unsafe fn load(p: *const Self::Cell) -> Self;
    unsafe fn store(self, p: *mut Self::Cell);
    /// Stores past the caches, where the machine can; `p` is aligned to a register. See `fence`.
    #[inline(always)]
    unsafe fn store_past_caches(self, p: *mut Self::Cell) {
        // SAFETY: as promised by the caller.
        unsafe { self.store(p) }
    }
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// Two registers of f32 rounded to bf16, as the bits of one. What is too small for a normal number may become zero.
    unsafe fn round_to_bf16(_: [Self; 2]) -> Self {
        unreachable!("only registers with bf16 dot products round to bf16")
    }
    /// Whether there are instructions that convert IEEE half.
    const CONVERTS_F16: bool = false;
    /// Two registers of f32 rounded to IEEE half, as the bits of one.
    unsafe fn round_to_f16(_: [Self; 2]) -> Self {
        unreachable!("only registers with conversions of IEEE half")
    }
    /// `self + a * b`.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// Sum of the lanes in a fixed order.
    unsafe fn sum(self) -> Self::Cell;
    /// The sums of the lanes of four registers.
    #[inline(always)]
    unsafe fn sum_four([a, b, c, d]: [Self; 4]) -> [Self::Cell; 4] {
        // SAFETY: as promised by the caller.
        unsafe { [a.sum(), b.sum(), c.sum(), d.sum()] }
    }
    /// Transposes the `LANES x LANES` matrix of the first `LANES` registers.
    unsafe fn transpose(rows: &mut [Self]);

    /// `self + a.lo * b.lo + a.hi * b.hi` for lanes that are pairs of bf16.
    unsafe fn dot_pairs(self, _a: Self, _b: Self) -> Self {
        unreachable!("only registers with bf16 dot products multiply pairs")
    }
    /// Lane i = the pair `(a[i], b[i])`.
    unsafe fn zip(_a: *const bf16, _b: *const bf16) -> Self {
        unreachable!("only registers with bf16 dot products make pairs")
    }
    /// Lanes converted from bf16.
    unsafe fn widen_bf16(p: *const bf16) -> Self;
    /// Lanes converted from IEEE half.
    unsafe fn widen_f16(p: *const f16) -> Self;

    /// Numbers of bf16, each a lane of f32, that add up to the lanes: two up to 2^-16, three to all bits of f32.
    unsafe fn split<const PLANES: usize>(self) -> [Self; 3] {
        unreachable!("only registers with bf16 dot products are split into bf16")
    }
    /// Lane i = the pair `(self[i], high[i])` of lanes that hold numbers of bf16.
    unsafe fn pair(self, _high: Self) -> Self {
        unreachable!("only registers with bf16 dot products make pairs")
    }

    /// Whether the register has the two functions below.
    const LOOKS_UP: bool = false;
    /// 32 words: each half of 16 bytes, the low one first, picks one in a table of 16.
    unsafe fn look_up_nibbles(_codes: *const u8, _table: *const u16) -> Self {
        unreachable!("only registers that look up")
    }
    /// 32 words: each of 32 bytes picks one in a table of 128 words, its highest bit flips that of the word.
    unsafe fn look_up_bytes(_codes: *const u8, _table: &[Self; 4]) -> Self {
        unreachable!("only registers that look up")
    }
}

/// Copies to memory that will not be read soon, past the caches; `dst` is visible after `fence`.
///
/// # Safety
/// As `Vector`; the slices have one length.
#[inline(always)]
pub unsafe fn copy_past_caches<V: Vector, T: Copy>(src: &[T], dst: &mut [T]) {
    let (bytes, register) = (size_of_val(src), size_of::<V>());
    if !dst.as_ptr().addr().is_multiple_of(register) || !bytes.is_multiple_of(register) {
        return dst.copy_from_slice(src);
    }
    let (src, dst) = (src.as_ptr().cast::<V::Cell>(), dst.as_mut_ptr().cast::<V::Cell>());
    for i in 0..bytes / register {
        // SAFETY: as promised by the caller; `dst` is aligned, and the bits of a number go through a register as they are.
        unsafe { V::load(src.add(i * V::LANES)).store_past_caches(dst.add(i * V::LANES)) };
    }
}

/// Orders `copy_past_caches` before what follows.
#[inline(always)]
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of every x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    };
}

/// Asks for the cache line at `p` to be brought into L2; any address is allowed.
#[inline(always)]
pub fn prefetch_l2(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast())
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
