// What becomes of a warp's sums, a row at a time.
//
// In each of its runs of 32 columns a thread has, of a row, the columns 8j + 2q and 8j + 2q + 1, where q = lane % 4 and
// j = 0..3: Run[j][0..1]. Four threads share a row; they trade 16-bit elements so that each reads and writes 16 bytes.
// With ALIGNED rows begin at multiples of 16 bytes and have whole chunks of them; without, nothing is assumed.
#pragma once
#include "tile/shape.cuh"

namespace tile {

using Run = float[4][2];

PTX_D int quad_lane() { return thread_id() % 4; }

// v[j] of lane q of four becomes v[q] of lane j.
PTX_D void transpose_quad(uint32_t (&v)[4]) {
  const int q = quad_lane();
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = shfl_xor(q & 1 ? v[i] : v[i + 1], 1);
    if (q & 1) v[i] = got;
    else v[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t got = shfl_xor(q & 2 ? v[i] : v[i + 2], 2);
    if (q & 2) v[i] = got;
    else v[i + 2] = got;
  }
}

// Four elements side by side, aligned to their size.
template <class T> PTX_D void store_four(Global<T> to, float a, float b, float c, float d) {
  if constexpr (sizeof(T) == 2) store(to.template as<uint2>(), uint2{pack<T>(a, b), pack<T>(c, d)});
  else store(to.template as<float4>(), float4{a, b, c, d});
}
template <class T> PTX_D float4 load_four(Global<const T> from) {
  if constexpr (sizeof(T) == 2) {
    const uint2 v = load_readonly(from.template as<const uint2>());
    return {low_half<T>(v.x), high_half<T>(v.x), low_half<T>(v.y), high_half<T>(v.y)};
  } else {
    return load_readonly(from.template as<const float4>());
  }
}

// Columns `column`.. of `row`, as far as below `columns`. All lanes take part; those with `exists` store.
template <bool ALIGNED, class T> PTX_D void store_run(Global<T> row, int column, int columns, const Run& v, bool exists) {
  if constexpr (!ALIGNED || sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = column + 8 * j + 2 * quad_lane();
      if constexpr (ALIGNED) {
        if (exists && at < columns) store((row + at).template as<float2>(), float2{v[j][0], v[j][1]});
      } else {
        for (int b = 0; b < 2; b++)
          if (exists && at + b < columns) store(row + (at + b), from_float<T>(v[j][b]));
      }
    }
  } else {
    uint32_t r[4];
#pragma unroll
    for (int j = 0; j < 4; j++) r[j] = pack<T>(v[j][0], v[j][1]);
    transpose_quad(r);
    const int at = column + 8 * quad_lane();
    if (exists && at < columns) store((row + at).template as<uint4>(), uint4{r[0], r[1], r[2], r[3]});
  }
}

// The same, read; zeros where there is nothing.
template <bool ALIGNED, class T> PTX_D void load_run(Run& v, Global<const T> row, int column, int columns, bool exists) {
  if constexpr (!ALIGNED || sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      for (int b = 0; b < 2; b++) {
        const int at = column + 8 * j + 2 * quad_lane() + b;
        v[j][b] = exists && at < columns ? to_float(load_readonly(row + at)) : 0;
      }
  } else {
    const int at = column + 8 * quad_lane();
    uint4 chunk{};
    if (exists && at < columns) chunk = load_readonly((row + at).template as<const uint4>());
    uint32_t r[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    transpose_quad(r);
#pragma unroll
    for (int j = 0; j < 4; j++) v[j][0] = low_half<T>(r[j]), v[j][1] = high_half<T>(r[j]);
  }
}

// Calls f(row, left, right) for each row of the warp that a thread has a part in; `row` counts from the warp's first.
// The loop is not unrolled, since its body is long: the sums move down to where it reads them.
template <class S, class F> PTX_D void for_each_row(typename S::Sums& c, F f) {
#pragma unroll 1
  for (int i = 0; i < 2 * S::MI; i++) {
    Run left, right;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) left[j][b] = c[0][j][b], right[j][b] = c[0][j + 4][b];
    f(i * 8 + S::lane() / 4, left, right);
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        if (i % 2 == 0) {
          c[0][j][b] = c[0][j][b + 2];
        } else {
#pragma unroll
          for (int m = 1; m < S::MI; m++) c[m - 1][j][b] = c[m][j][b], c[m - 1][j][b + 2] = c[m][j][b + 2];
        }
      }
  }
}

// Sums begin with the bias of their column: `place(half, i)` is where in `bias` column i of a half of the tile is, negative
// for none.
template <class S, class T, class Place> PTX_D void begin_with_bias(typename S::Sums& c, Global<const T> bias, Place place) {
#pragma unroll
  for (int j = 0; j < NI; j++)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int at = place(j / 4, S::run_column(0) + j % 4 * 8 + 2 * quad_lane() + b);
      const float value = bias && at >= 0 ? to_float(load_readonly(bias + at)) : 0;
#pragma unroll
      for (int i = 0; i < S::MI; i++) c[i][j][b] = c[i][j][b + 2] = value;
    }
}

}  // namespace tile
