// The shape of a tile whose products warpgroups compute (sm_90a), and what becomes of their sums.
//
// C[m, n] = sum over k of A[m, k] B[n, k]. The first warpgroup copies slices of 64 elements along K into shared memory,
// STAGES of them in flight; each of the others owns 64 rows of the tile. As everywhere, a run of 32 columns of the tile's
// left half and the one half a tile to its right are in the same thread.
#pragma once
#include "tile/runs.cuh"

namespace tile {

constexpr int WARPGROUP = 128, GROUP_ROWS = 64;
// Boxes of 64 elements by as many rows as there are, 128 bytes each, swizzled as wgmma reads them.
constexpr int BOX = 64, BOX_ROW_BYTES = 128;

template <class Element_, int BM_, int BN_, int STAGES_> struct Warpgroups {
  using Math = Element_;
  using Element = Element_;
  static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_;
  static constexpr int SLICE = BOX, CHUNK = CHUNK_BYTES / sizeof(Element);
  static constexpr int GROUPS = BM / GROUP_ROWS, THREADS = WARPGROUP * (1 + GROUPS);
  static constexpr int A_BYTES = BM * BOX_ROW_BYTES, STAGE_BYTES = A_BYTES + BN * BOX_ROW_BYTES;
  static constexpr int SHARED_BYTES = STAGES * (STAGE_BYTES + 2 * 8);
  static constexpr int REGISTERS = BN / 2;
  // A thread's accumulators, as in wgmma.cuh.
  using Sums = float[REGISTERS];

  PTX_D static int group() { return thread_id() / WARPGROUP - 1; }
  // The first of the two rows of the tile that a thread has parts of; the other is 8 below.
  PTX_D static int row() { return group() * GROUP_ROWS + thread_id() / 32 % 4 * 16 + thread_id() % 32 / 4; }
};

template <class S> PTX_D void begin_with_zeros(float (&c)[S::REGISTERS]) {
#pragma unroll
  for (int i = 0; i < S::REGISTERS; i++) c[i] = 0;
}

template <class S, class T, class Place>
PTX_D void begin_with_bias(float (&c)[S::REGISTERS], Global<const T> bias, int expert, int columns, Place place) {
#pragma unroll
  for (int i = 0; i < S::REGISTERS; i += 4)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const int half = i / (S::REGISTERS / 2), column = i % (S::REGISTERS / 2) * 2 + 2 * quad_lane() + b;
      c[i + b] = c[i + b + 2] = bias_of(bias, expert, columns, place(half, column));
    }
}

template <class S, class F> PTX_D void for_each_row(float (&c)[S::REGISTERS], F f) {
  constexpr int HALF = S::REGISTERS / 2, OF_RUN = RUN / 2;
#pragma unroll 1
  for (int column = 0; column < S::BN / 2; column += RUN) {
#pragma unroll
    for (int below = 0; below < 2; below++) {
      Run left, right;
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          left[j][b] = c[4 * j + 2 * below + b];
          right[j][b] = c[HALF + 4 * (BUG(warpgroup_fragment) ? 3 - j : j) + 2 * below + b];
        }
      f(S::row() + 8 * below, column, left, right);
    }
#pragma unroll
    for (int i = 0; i < HALF - OF_RUN; i++) c[i] = c[i + OF_RUN], c[HALF + i] = c[HALF + i + OF_RUN];
  }
}

}  // namespace tile
