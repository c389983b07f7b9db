//! The portable register: an array that the compiler vectorises for whatever it is compiled for.

use super::Vector;
use half::{bf16, f16};

/// `N` numbers handled as one register.
#[derive(Clone, Copy)]
pub struct Array<F, const N: usize>([F; N]);

macro_rules! array_vector {
    ($float:ty) => {
        // SAFETY: plain Rust, no instruction set is assumed.
        unsafe impl<const N: usize> Vector for Array<$float, N> {
            type Cell = $float;
            const LANES: usize = N;

            #[inline(always)]
            unsafe fn zero() -> Self {
                Self([0.0; N])
            }
            #[inline(always)]
            unsafe fn splat(p: *const $float) -> Self {
                // SAFETY: the caller's pointer is valid.
                Self([unsafe { *p }; N])
            }
            #[inline(always)]
            unsafe fn load(p: *const $float) -> Self {
                // SAFETY: the caller's pointer is valid for N numbers.
                Self(unsafe { p.cast::<[$float; N]>().read_unaligned() })
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $float) {
                // SAFETY: the caller's pointer is valid for N numbers.
                unsafe { p.cast::<[$float; N]>().write_unaligned(self.0) }
            }
            #[inline(always)]
            unsafe fn add(mut self, other: Self) -> Self {
                for i in 0..N {
                    self.0[i] += other.0[i];
                }
                self
            }
            #[inline(always)]
            unsafe fn fma(mut self, a: Self, b: Self) -> Self {
                for i in 0..N {
                    self.0[i] += a.0[i] * b.0[i];
                }
                self
            }
            #[inline(always)]
            unsafe fn sum(self) -> $float {
                self.0.iter().sum()
            }
            #[inline(always)]
            unsafe fn transpose(rows: &mut [Self]) {
                for i in 0..N {
                    for j in 0..i {
                        let t = rows[i].0[j];
                        rows[i].0[j] = rows[j].0[i];
                        rows[j].0[i] = t;
                    }
                }
            }
            #[inline(always)]
            unsafe fn widen_bf16(p: *const bf16) -> Self {
                // SAFETY: the caller's pointer is valid for N numbers.
                Self(std::array::from_fn(|i| unsafe { (*p.add(i)).into() }))
            }
            #[inline(always)]
            unsafe fn widen_f16(p: *const f16) -> Self {
                // SAFETY: the caller's pointer is valid for N numbers.
                Self(std::array::from_fn(|i| unsafe { (*p.add(i)).into() }))
            }
        }
    };
}
array_vector!(f32);
array_vector!(f64);
