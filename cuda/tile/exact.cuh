// Elementary functions and the order of numbers as fastmoe-core defines them: the same bits as on the CPU.
//
// Every operation is a plain IEEE multiplication, addition, division or square root, none fused, in the order of
// fastmoe-core's exp.rs and elementary.rs.
#pragma once
#include "ptx/ptx.cuh"

namespace moe {
using namespace ptx;

constexpr uint32_t SIGN = 0x80000000u;
PTX_D float infinity() { return bits_float(0x7f800000u); }
PTX_D float sub_rn(float a, float b) { return add_rn(a, -b); }

// p = p * x + c for the coefficients in turn.
template <int N> PTX_D float polynomial(const float (&coefficients)[N], float x) {
  float p = coefficients[0];
#pragma unroll
  for (int i = 1; i < N; i++) p = add_rn(mul_rn(p, x), coefficients[i]);
  return p;
}

// e^x; 0 where it would be subnormal, infinite from 127.5 ln 2 on.
PTX_D float exp_exact(float x) {
  constexpr float P[] = {1.9875691e-4f, 1.3982e-3f, 8.333452e-3f, 4.1665796e-2f, 1.6666665e-1f, 0.5f};
  const float round = 12582912.0f;
  const float shifted = add_rn(mul_rn(x, 1.44269504088896340736f), round);
  const float n = sub_rn(shifted, round);
  const float r = sub_rn(sub_rn(x, mul_rn(n, 0.6933594f)), mul_rn(n, -2.1219444e-4f));
  const float mantissa = add_rn(add_rn(mul_rn(polynomial(P, r), mul_rn(r, r)), r), 1.0f);
  float y = mul_rn(mantissa, bits_float((float_bits(shifted) << 23) + float_bits(1.0f)));
  if (x < -87.33654f) y = 0.0f;
  return x > 88.37626f ? infinity() : y;
}

PTX_D float tanh_exact(float x) {
  constexpr float P[] = {-5.7049887e-3f, 2.0639089e-2f, -5.3739716e-2f, 1.3331442e-1f, -3.3333282e-1f};
  const float square = mul_rn(x, x);
  const float small = add_rn(mul_rn(mul_rn(polynomial(P, square), square), x), x);
  const uint32_t sign = float_bits(x) & SIGN;
  const float size = bits_float(float_bits(x) ^ sign);
  const float large = sub_rn(1.0f, div_rn(2.0f, add_rn(exp_exact(add_rn(size, size)), 1.0f)));
  return size < 0.625f ? small : bits_float((float_bits(large) & ~SIGN) | sign);
}

// ln(1 + t) for 0 <= t <= 1.
PTX_D float log1p_exact(float t) {
  constexpr float P[] = {1.0f / 15, 1.0f / 13, 1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3};
  const float s = div_rn(t, add_rn(t, 2.0f));
  const float square = mul_rn(s, s);
  const float twice = add_rn(s, s);
  return add_rn(mul_rn(mul_rn(polynomial(P, square), square), twice), twice);
}

// An integer that grows with the number: -0 equals 0, NaN comes before every number, nothing is below 1.
PTX_D uint32_t order(float x) {
  if (x != x) return 1;
  const uint32_t bits = float_bits(add_rn(x, 0.0f));
  return bits & SIGN ? ~bits : bits | SIGN;
}
// The number again; NaN for 1.
PTX_D float number(uint32_t ordered) {
  if (ordered <= 1) return bits_float(0x7fc00000u);
  return bits_float(ordered & SIGN ? ordered ^ SIGN : ~ordered);
}

// One element of a row that a warp looks through.
struct Pick {
  uint32_t key;
  uint32_t id;
};
constexpr uint32_t NOBODY = ~0u;
PTX_D Pick before_all() { return {~0u, NOBODY}; }

// The best element after `last`, by key descending, then id ascending. Element i * 32 + lane is the i-th of its lane;
// those from `begin` to before `end` are looked at. `key(i)` is the order of one, or 0 where there is none.
template <class Key> PTX_D Pick next_best(int begin, int end, Pick last, Key key) {
  Pick best = {0, NOBODY};
  for (int i = begin; i < end; i++) {
    const Pick next = {key(i), static_cast<uint32_t>(i * 32 + thread_id() % 32)};
    const bool after = next.key < last.key || (next.key == last.key && next.id > last.id);
    if (after && next.key > best.key) best = next;
  }
  const uint32_t most = redux_max(best.key);
  return {most, redux_min(best.key == most ? best.id : NOBODY)};
}

}  // namespace moe
