// The product of a slice of floats by fused multiply-add, k ascending. A lane owns the elements that it would own of
// tensor core fragments: rows 8i + lane / 4 of its warp, columns 8j + lane % 4 * 2 and the next of its two runs.
#pragma once
#include "tile/shape.cuh"

namespace tile {

// Four elements along k, from 4 * chunk on, of row first + beyond of m or n: `first` below 8 beyond a multiple of 32, `beyond`
// a multiple of 8. The swizzle exchanges eights of rows within 32, so that places differ by constants.
template <class S, int SIZE, Major MAJOR> PTX_D float4 four_deep(Shared slice, int first, int beyond, int chunk) {
  if constexpr (MAJOR != Major::MN) {
    return load_shared<float4>(slice + chunk_offset<float, SIZE, MAJOR>(first + beyond, chunk));
  } else {
    const Shared from = slice + (4 * chunk * SIZE + first) * 4;
    float v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = load_shared<float>(from + (k * SIZE + (BUG(fma_swizzle) ? beyond : beyond ^ 8 * k)) * 4);
    return {v[0], v[1], v[2], v[3]};
  }
}

template <class S, Major A, Major B> PTX_D void fma_slice(typename S::Sums& c, Shared slice) {
  const int row = S::warp_row() + S::lane() / 4, column = S::run_column(0) + S::lane() % 4 * 2;
#pragma unroll 1
  for (int chunk = 0; chunk < SLICE_BYTES / CHUNK_BYTES; chunk++) {
    float4 a[2 * S::MI];
#pragma unroll
    for (int i = 0; i < 2 * S::MI; i++) a[i] = four_deep<S, S::BM, A>(slice, row, 8 * i, chunk);
#pragma unroll
    for (int j = 0; j < 2 * NI; j++) {
      const float4 b = four_deep<S, S::BN, B>(slice + S::A_BYTES, column + j % 2, j / NI * (S::BN / 2) + j / 2 % 4 * 8, chunk);
#pragma unroll
      for (int i = 0; i < 2 * S::MI; i++) {
        float& sum = c[i / 2][j / 2][i % 2 * 2 + j % 2];
        sum = fma_rn(a[i].x, b.x, sum);
        sum = fma_rn(a[i].y, b.y, sum);
        sum = fma_rn(a[i].z, b.z, sum);
        sum = fma_rn(a[i].w, b.w, sum);
      }
    }
  }
}

}  // namespace tile
