// Rows of a matrix in row-major order, shared out over warps: 16 bytes a lane where the rows allow it, else one element.
#pragma once
#include <type_traits>

#include "ptx/ptx.cuh"

namespace moe {
using namespace ptx;

PTX_D int lane() { return thread_id() % 32; }

// Columns that a lane holds when it moves 16 bytes.
template <class T> constexpr int WIDE = 16 / static_cast<int>(sizeof(T));

// An index of a plan that may have been made by hand: -1, which stands for no row, where there is none of that number.
PTX_D int below(int limit, int index) { return static_cast<unsigned>(index) < static_cast<unsigned>(limit) ? index : -1; }

// Whether every row of `columns` elements starts at a multiple of 16 bytes.
template <class T> PTX_D bool rows_are_wide(int columns, Global<const T> rows) {
  return columns % WIDE<T> == 0 && (!rows || rows.aligned(16));
}

// Calls `work(row, part)` for each part of each row; every call is one warp's.
template <class Work> PTX_D void for_each_part(int64_t rows, int parts, Work work) {
  const int per_block = block_threads() / 32;
  const int64_t step = static_cast<int64_t>(block_count()) * per_block;
  for (int64_t item = static_cast<int64_t>(block_id()) * per_block + thread_id() / 32; item < rows * parts; item += step)
    work(item / parts, static_cast<int>(item % parts));
}

// Parts of a row that one warp covers at once.
template <int N> PTX_D int parts_of(int columns) { return (columns + 32 * N - 1) / (32 * N); }

// N neighbouring elements of a row, one or 16 bytes, as they lie in memory.
template <class T, int N> struct Cells {
  static_assert(N == 1 || N == WIDE<T>);
  std::conditional_t<N == 1, T, uint4> bits;

  PTX_D static Cells load(Global<const T> from) {
    if constexpr (N == 1)
      return {load_readonly(from)};
    else
      return {load_readonly(from.template as<const uint4>())};
  }
  PTX_D float operator[](int i) const {
    if constexpr (N == 1) {
      return to_float(bits);
    } else {
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
      if constexpr (N == 4)
        return bits_float(words[i]);
      else
        return i % 2 ? high_half<T>(words[i / 2]) : low_half<T>(words[i / 2]);
    }
  }
};

template <class T, int N> PTX_D float dot(const Cells<T, N>& a, const Cells<T, N>& b, float sum) {
#pragma unroll
  for (int i = 0; i < N; i++) sum = fma_rn(a[i], b[i], sum);
  return sum;
}

// Sums in float32 on their way to N elements.
template <int N> struct Sums {
  float at[N];

  PTX_D static Sums zeros() {
    Sums sums;
#pragma unroll
    for (int i = 0; i < N; i++) sums.at[i] = 0.0f;
    return sums;
  }
  // As the CPU backend adds: a product, rounded, then a sum, rounded.
  template <class T> PTX_D void add_scaled(float scale, const Cells<T, N>& cells) {
#pragma unroll
    for (int i = 0; i < N; i++) at[i] = add_rn(at[i], mul_rn(scale, cells[i]));
  }
  template <class T> PTX_D void store(Global<T> to) const {
    if constexpr (N == 1) {
      ptx::store(to, from_float<T>(at[0]));
    } else {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if constexpr (N == 4)
          words[i] = float_bits(at[i]);
        else
          words[i] = pack<T>(at[2 * i], at[2 * i + 1]);
      }
      ptx::store(to.template as<uint4>(), uint4{words[0], words[1], words[2], words[3]});
    }
  }
};

// Adds scale * rows[row], of lanes 0 to count - 1 in turn, to the sums of the columns from `column` on; a row of -1 adds
// nothing.
template <int N, class T>
PTX_D void add_rows(Sums<N>& total, Global<const T> rows, int columns, int column, int row, float scale, int count) {
  constexpr int AT_ONCE = 4;  // rows in flight
  const bool inside = column < columns;
  for (int k = 0; k < count; k += AT_ONCE) {
    Cells<T, N> cells[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int r = shfl(row, k + i);
      if (r >= 0 && k + i < count && inside) cells[i] = Cells<T, N>::load(rows + (static_cast<int64_t>(r) * columns + column));
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const float factor = shfl(scale, k + i);
      if (shfl(row, k + i) >= 0 && k + i < count && inside) total.add_scaled(factor, cells[i]);
    }
  }
}

// The sum of all lanes, in every lane; the order of the additions is fixed.
PTX_D float sum_of_lanes(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = add_rn(x, shfl_xor(x, distance));
  return x;
}

// The sum over all threads, in a fixed order. Takes all threads; `scratch` holds a word per warp, and may be used
// again at once.
PTX_D float sum_of_block(float value, Shared scratch) {
  const float of_my_warp = sum_of_lanes(value);
  if (thread_id() % 32 == 0) store_shared(scratch + thread_id() / 32 * 4, of_my_warp);
  sync_block();
  float sum = 0.0f;
  for (int w = 0; w < block_threads() / 32; w++) sum = add_rn(sum, load_shared<float>(scratch + w * 4));
  sync_block();
  return sum;
}

}  // namespace moe
