// device/math.cuh on the CPU. Approximations are wrong by an amount that their documentation allows, drawn from the
// argument and the seed of the run; seed 0 takes the nearest float.
#pragma once
#include <bit>
#include <cmath>

#include "emulator/settings.h"
#include "ptx/host/types.h"

namespace ptx {

inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt_rn(float x) { return std::sqrt(x); }

inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int popcount(uint32_t x) { return std::popcount(x); }
inline int lowest_bit(uint32_t x) { return std::countr_zero(x); }

// `exact`, wrong by up to `error` relative to itself, the rounding to float included.
inline float approximate(float x, double exact, double error) {
  uint64_t h = (float_bits(x) + emulator::settings.seed * 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 31) * 0x94d049bb133111ebu;
  const double unit = static_cast<double>(static_cast<int64_t>(h ^ h >> 29)) * 0x1p-63;
  return static_cast<float>(emulator::settings.seed ? exact * (1 + unit * (error - 0x1p-24)) : exact);
}
inline float flush_subnormal(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

inline float exp2_approx(float x) {
  x = flush_subnormal(x);
  if (x == 0 || !std::isfinite(x)) return std::exp2(x);
  return flush_subnormal(approximate(x, std::exp2(static_cast<double>(x)), 0x1p-22));
}
inline float rcp_approx(float x) {
  x = flush_subnormal(x);
  if (x == 0 || !std::isfinite(x)) return 1 / x;
  return flush_subnormal(approximate(x, 1 / static_cast<double>(x), 0x1p-23));
}
inline float tanh_approx(float x) {
  if (x == 0 || !std::isfinite(x)) return std::tanh(x);
  return std::fmin(1.f, std::fmax(-1.f, approximate(x, std::tanh(static_cast<double>(x)), 0x1.02p-11)));
}
inline float erf(float x) {
  if (x == 0 || !std::isfinite(x)) return std::erf(x);
  return std::fmin(1.f, std::fmax(-1.f, approximate(x, std::erf(static_cast<double>(x)), 0x1p-22)));
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = float_bits(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}
template <class T> uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T> float low_half(uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair)}); }
template <class T> float high_half(uint32_t pair) { return to_float(T{static_cast<uint16_t>(pair >> 16)}); }
// As ptxas writes it out for every GPU: a NaN is not made canonical but loses its low bits, even where it has no others.
inline uint32_t to_tf32(float x) { return (float_bits(x) + (std::isfinite(x) ? 0x1000 : 0)) & 0xffffe000; }

}  // namespace ptx
