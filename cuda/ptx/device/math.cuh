// Conversions, arithmetic whose rounding is fixed, approximations of the special function unit, and bits.
#pragma once
#include "ptx/device/types.cuh"

namespace ptx {

// Never contracted nor reordered: where results must have the same bits on every device.
PTX_D float add_rn(float a, float b) { return __fadd_rn(a, b); }
PTX_D float mul_rn(float a, float b) { return __fmul_rn(a, b); }
PTX_D float div_rn(float a, float b) { return __fdiv_rn(a, b); }
PTX_D float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
PTX_D float sqrt_rn(float x) { return __fsqrt_rn(x); }
// Largest relative error 2^-22, 2^-23, 2^-10.987 (the PTX manual).
PTX_D float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
PTX_D float rcp_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
PTX_D float tanh_approx(float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Two ulps.
PTX_D float erf(float x) { return erff(x); }

PTX_D uint32_t float_bits(float x) { return __float_as_uint(x); }
PTX_D float bits_float(uint32_t x) { return __uint_as_float(x); }
PTX_D int popcount(uint32_t x) { return __popc(x); }
// Index of the lowest set bit; x is not 0.
PTX_D int lowest_bit(uint32_t x) { return __ffs(x) - 1; }

PTX_D float to_float(float x) { return x; }
PTX_D float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PTX_D float to_float(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
// Round to nearest even; NaN becomes the canonical 0x7fff; f16 overflows to infinity.
template <class T> PTX_D T from_float(float x);
template <> PTX_D float from_float<float>(float x) { return x; }
template <> PTX_D bf16 from_float<bf16>(float x) { bf16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
template <> PTX_D f16 from_float<f16>(float x) { f16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
// Two values in one register, the first in the low half.
template <class T> PTX_D uint32_t pack(float low, float high);
template <> PTX_D uint32_t pack<bf16>(float low, float high) {
  uint32_t y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y;
}
template <> PTX_D uint32_t pack<f16>(float low, float high) {
  uint32_t y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y;
}
template <class T> PTX_D float low_half(uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair)}); }
template <class T> PTX_D float high_half(uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair >> 16)}); }
// Nearest tf32, ties away from zero.
PTX_D uint32_t to_tf32(float x) { uint32_t y; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x)); return y; }

}  // namespace ptx
