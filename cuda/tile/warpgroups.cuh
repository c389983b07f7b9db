// The shape of a tile that warpgroups compute (sm_90a).
//
// C[m, n] = sum over k of A[m, k] B[n, k]. The first warpgroup copies slices of 64 elements along K into shared memory,
// STAGES of them in flight; each of the others owns 64 rows of the tile, each of its warps 16. Two blocks form a cluster,
// and what both need of an operand is read once.
#pragma once
#include "tile/pairs.cuh"

namespace tile {

constexpr int WARPGROUP = 128, GROUP_ROWS = 64, WARP_ROWS = 16;
// Boxes of 64 elements by as many rows as there are, 128 bytes each, swizzled as wgmma reads them and TMA copies them.
constexpr int BOX = 64, BOX_ROW_BYTES = 128;

// BUFFERS: boxes of results that a warp has in shared memory.
template <class Element_, int BM_, int BN_, int STAGES_, int BUFFERS_> struct Warpgroups {
  using Element = Element_;
  using Teams = ByRows;
  static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_, BUFFERS = BUFFERS_;
  static constexpr int SLICE = BOX, CHUNK = CHUNK_BYTES / sizeof(Element);
  static constexpr int GROUPS = BM / GROUP_ROWS, THREADS = WARPGROUP * (1 + GROUPS);
  static constexpr int A_BYTES = BM * BOX_ROW_BYTES, STAGE_BYTES = A_BYTES + BN * BOX_ROW_BYTES;
  static constexpr int RESULTS_AT = STAGES * STAGE_BYTES, BARRIERS_AT = RESULTS_AT + BUFFERS * BM * BOX_ROW_BYTES;
  static constexpr int LOADED_AT = BARRIERS_AT + STAGES * 2 * 8, SHARED_BYTES = LOADED_AT + 4 * GROUPS * 2 * 8;
  // A thread's accumulators: c[4j + 2h + i] is of its row h and column 8j + 2 (lane % 4) + i.
  using Sums = float[BN / 2];

  PTX_D static int group() { return thread_id() / WARPGROUP - 1; }
  // The first row of the tile that is the warp's.
  PTX_D static int warp_row() { return (thread_id() - WARPGROUP) / 32 * WARP_ROWS; }
  // The two barriers of what a warp has loaded for its results.
  PTX_D static Shared loaded(int warp, int place) { return shared_memory() + (LOADED_AT + (2 * warp + place) * 8); }
  // A thread has parts of two rows of its warp, 8 apart.
  PTX_D static int lane_row(int h) { return thread_id() % 32 / 4 + 8 * h; }
  PTX_D static int lane_column(int j) { return 8 * j + thread_id() % 4 * 2; }
};

PTX_D bool leads_warp() { return thread_id() % 32 == 0; }

// As many slices as there is room for beside two boxes; or the boxes that hidden states want, and one slice less.
template <class Element> using DeepTile = Warpgroups<Element, 128, 256, 4, 2>;
template <class Element> using WideResultTile = Warpgroups<Element, 128, 256, 3, 5>;

// Adds to the sums the bias of their column: column i of a half is at place(half, i) of `bias`, nowhere where negative.
template <class S, class T, class Place> PTX_D void add_bias(typename S::Sums& c, Global<const T> bias, Place place) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float of_lane[S::BN / 64];  // of columns lane, lane + 32, ...
#pragma unroll
    for (int i = 0; i < S::BN / 64; i++) {
      const int at = place(half, 32 * i + thread_id() % 32);
      of_lane[i] = at >= 0 ? to_float(load_readonly(bias + at)) : 0;
    }
#pragma unroll
    for (int j = 0; j < S::BN / 16; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        const float value = shfl(of_lane[j / 4], S::lane_column(j) % 32 + b);
        const int i = half * S::BN / 4 + 4 * j + b;
        c[i] += value, c[i + 2] += value;
      }
  }
}

}  // namespace tile
