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
  if (BUG(run_half_transposed)) return;
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
    if (exists && at < columns + 8 * BUG(run_columns_tail)) store((row + at).template as<uint4>(), uint4{r[0], r[1], r[2], r[3]});
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

// Adds to v what stands where it will be stored. (load_run is for memory that the kernel does not write.)
template <bool ALIGNED, class T> PTX_D void add_run(Run& v, Global<T> row, int column, int columns, bool exists) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int at = column + 8 * j + 2 * quad_lane();
    if constexpr (ALIGNED && sizeof(T) == 4) {
      const float2 old = exists && at < columns && !BUG(weight_no_sum) ? load((row + at).template as<float2>()) : float2{};
      v[j][0] += old.x, v[j][1] += old.y;
    } else {
      for (int b = 0; b < 2; b++)
        if (exists && at + b < columns && !BUG(weight_no_sum)) v[j][b] += to_float(load(row + (at + b)));
    }
  }
}

// Runs of 32 gate and of 32 up columns that alternate in memory, for the units from `unit` on, as far as below `units`.
template <bool ALIGNED, class T>
PTX_D void store_pairs(Global<T> row, int unit, int units, const Run& gate, const Run& up, bool exists) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int at = unit + 8 * j + 2 * quad_lane();
    if constexpr (ALIGNED) {
      if (exists && at < units) store_four(row + 2 * at, gate[j][0], up[j][0], gate[j][1], up[j][1]);
    } else {
      for (int b = 0; b < 2; b++)
        if (exists && at + b < units + BUG(run_pairs_tail)) {
          store(row + 2 * (at + b), from_float<T>(gate[j][b]));
          store(row + (2 * (at + b) + 1), from_float<T>(up[j][b]));
        }
    }
  }
}
template <bool ALIGNED, class T>
PTX_D void load_pairs(Run& gate, Run& up, Global<const T> row, int unit, int units, bool exists) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int at = unit + 8 * j + 2 * quad_lane();
    if constexpr (ALIGNED) {
      const float4 v = exists && at < units ? load_four(row + 2 * at) : float4{};
      gate[j][0] = v.x, up[j][0] = v.y, gate[j][1] = v.z, up[j][1] = v.w;
    } else {
      for (int b = 0; b < 2; b++) {
        const bool there = exists && at + b < units;
        gate[j][b] = there ? to_float(load_readonly(row + 2 * (at + b))) : 0;
        up[j][b] = there ? to_float(load_readonly(row + (2 * (at + b) + 1))) : 0;
      }
    }
  }
}

// Calls f(row, column, left, right) for each row of the tile that a thread has a part in, with a run from `column` on and
// the one half a tile to the right of it. The loop is not unrolled, since its body is long: the sums move down to where it
// reads them.
template <class S, class F> PTX_D void for_each_row(typename S::Sums& c, F f) {
#pragma unroll 1
  for (int i = 0; i < 2 * S::MI; i++) {
    Run left, right;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) left[j][b] = c[0][j][b], right[j][b] = c[0][BUG(run_fragment) ? 7 - j : j + 4][b];
    f(S::warp_row() + i * 8 + S::lane() / 4, S::run_column(0), left, right);
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

template <class S> PTX_D void begin_with_zeros(typename S::Sums& c) {
#pragma unroll
  for (int i = 0; i < S::MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int q = 0; q < 4; q++) c[i][j][q] = 0;
}

// Sums begin with the bias [E, columns] of their column, where there is one: column i of a half of the tile is column
// place(half, i), none where that is negative.
template <class S, class T, class Place>
PTX_D void begin_with_bias(typename S::Sums& c, Global<const T> bias, int expert, int columns, Place place) {
#pragma unroll
  for (int j = 0; j < NI; j++)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float value = 0;
      if (bias) {
        const int at = place(j / 4, S::run_column(0) + j % 4 * 8 + 2 * quad_lane() + b);
        if (at >= 0) value = to_float(load_readonly(bias + (static_cast<int64_t>(BUG(bias_first_expert) ? 0 : expert) * columns + at)));
      }
#pragma unroll
      for (int i = 0; i < S::MI; i++) c[i][j][b] = c[i][j][b + 2] = value;
    }
}

}  // namespace tile
