// The product of a slice of floats by fused multiply-add, k ascending. A lane owns the elements that it would own of
// tensor core fragments: rows 8i + lane / 4 of its warp, columns 8j + lane % 4 * 2 and the next of its two runs.
#pragma once
#include "tile/shape.cuh"

namespace tile {

// Four elements along k, from 4 * chunk on, of row m or n.
template <class S, int SIZE, Major MAJOR> PTX_D float4 four_deep(Shared slice, int row, int chunk) {
  if constexpr (MAJOR != Major::MN) return load_shared<float4>(slice + chunk_offset<float, SIZE, MAJOR>(row, chunk));
  float v[4];
#pragma unroll
  for (int k = 0; k < 4; k++)
    v[k] = load_shared<float>(slice + (chunk_offset<float, SIZE, MAJOR>(4 * chunk + k, row / 4) + row % 4 * 4));
  return {v[0], v[1], v[2], v[3]};
}

template <class S, Major A, Major B> PTX_D void fma_slice(typename S::Sums& c, Shared slice) {
  const int row = S::warp_row() + S::lane() / 4, column = S::run_column(0) + S::lane() % 4 * 2;
#pragma unroll 1
  for (int chunk = 0; chunk < SLICE_BYTES / CHUNK_BYTES; chunk++) {
    float4 a[2 * S::MI];
#pragma unroll
    for (int i = 0; i < 2 * S::MI; i++) a[i] = four_deep<S, S::BM, A>(slice, row + 8 * i, chunk);
#pragma unroll
    for (int j = 0; j < 2 * NI; j++) {
      const int n = column + j / NI * (S::BN / 2) + j / 2 % 4 * 8 + j % 2;
      const float4 b = four_deep<S, S::BN, B>(slice + S::A_BYTES, n, chunk);
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
