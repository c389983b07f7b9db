// The shape of a tile that warpgroups compute (sm_90a), and the way of its sums to memory.
//
// C[m, n] = sum over k of A[m, k] B[n, k]. The first warpgroup copies slices of 64 elements along K into shared memory,
// STAGES of them in flight; each of the others owns 64 rows of the tile, each of its warps 16. Two blocks form a cluster,
// and what both need of an operand is read once.
#pragma once
#include "tile/pairs.cuh"

namespace tile {

constexpr int WARPGROUP = 128, GROUP_ROWS = 64, WARP_ROWS = 16;
// Boxes of 64 elements by as many rows as there are, 128 bytes each, swizzled as wgmma reads them.
constexpr int BOX = 64, BOX_ROW_BYTES = 128;
// What a warp has in shared memory for its rows of results: 128 elements of each.
constexpr int STAGED = 128, STAGED_ROW_BYTES = 2 * STAGED;

template <class Element_, int BM_, int BN_, int STAGES_> struct Warpgroups {
  using Element = Element_;
  using Teams = ByRows;
  static constexpr int BM = BM_, BN = BN_, STAGES = STAGES_;
  static constexpr int SLICE = BOX, CHUNK = CHUNK_BYTES / sizeof(Element);
  static constexpr int GROUPS = BM / GROUP_ROWS, THREADS = WARPGROUP * (1 + GROUPS);
  static constexpr int A_BYTES = BM * BOX_ROW_BYTES, STAGE_BYTES = A_BYTES + BN * BOX_ROW_BYTES;
  static constexpr int STAGED_AT = STAGES * STAGE_BYTES, BARRIERS_AT = STAGED_AT + BM * STAGED_ROW_BYTES;
  static constexpr int SHARED_BYTES = BARRIERS_AT + STAGES * 2 * 8;
  // A thread's accumulators: c[4j + 2h + i] is of its row h and column 8j + 2 (lane % 4) + i.
  using Sums = float[BN / 2];

  PTX_D static int group() { return thread_id() / WARPGROUP - 1; }
  // The first row of the tile that is the warp's.
  PTX_D static int warp_row() { return (thread_id() - WARPGROUP) / 32 * WARP_ROWS; }
  // A thread has parts of two rows of its warp, 8 apart.
  PTX_D static int lane_row(int h) { return thread_id() % 32 / 4 + 8 * h; }
  PTX_D static int lane_column(int j) { return 8 * j + thread_id() % 4 * 2; }
};

// Rows of a matrix in memory, from a warp's first on.
template <class Element> struct Lines {
  Global<Element> first;
  int64_t pitch;
  int count;

  PTX_D Lines(Global<Element> all, int row, int end, int64_t pitch) : first(all + row * pitch), pitch(pitch), count(end - row) {}
};

// A warp's rows in shared memory, where threads have pairs of elements but memory is read and written by whole rows.
template <class S> class Staged {
  using T = typename S::Element;
  const Shared base = shared_memory() + (S::STAGED_AT + S::warp_row() * STAGED_ROW_BYTES);

  PTX_D Shared at(int row, int byte) const {
    return base + (row * STAGED_ROW_BYTES + (byte ^ (row & 7) << 4));
  }
  // f(i, exists, there, shared) of the lane's i-th chunk of 16 bytes, which is there in memory if it exists.
  template <class Element, class Column, class F> PTX_D void for_each_chunk(const Lines<Element>& lines, Column column, F f) const {
    const int row = thread_id() % 32 / 16, chunk = thread_id() % 16, at = column(chunk * S::CHUNK);
    Global<Element> there = lines.first + (row * lines.pitch + (at < 0 ? 0 : at));
#pragma unroll
    for (int i = 0; i < WARP_ROWS / 2; i++, there = there + 2 * lines.pitch) {
      f(i, at >= 0 && row + 2 * i < lines.count, there, this->at(row + 2 * i, chunk * CHUNK_BYTES));
    }
  }

 public:
  // Elements `column` and the next one of row h of the thread; `column` is even.
  PTX_D void put_pair(int h, int column, uint32_t both) const { store_shared(at(S::lane_row(h), 2 * column), both); }
  PTX_D void put(int h, int column, float first, float second) const { put_pair(h, column, pack<T>(first, second)); }
  PTX_D void put_one(int h, int column, float value) const { store_shared(at(S::lane_row(h), 2 * column), from_float<T>(value)); }
  PTX_D uint32_t get(int h, int column) const { return load_shared<uint32_t>(at(S::lane_row(h), 2 * column)); }

  // Fills the rows from those in memory: column i from column(i) there, with zeros where that is negative.
  template <class Column> PTX_D void fill(const Lines<const T>& lines, Column column) const {
    uint4 chunks[WARP_ROWS / 2];
    for_each_chunk(lines, column, [&](int i, bool exists, Global<const T> there, Shared) {
      chunks[i] = exists ? load_readonly(there.template as<const uint4>()) : uint4{};
    });
    for_each_chunk(lines, column, [&](int i, bool, Global<const T>, Shared to) { store_shared(to, chunks[i]); });
    if (!BUG(staged_no_sync)) sync_warp();
  }
  // Stores column i at column(i), nowhere where that is negative.
  template <class Column> PTX_D void drain(const Lines<T>& lines, Column column) const {
    if (!BUG(staged_no_sync)) sync_warp();
    for_each_chunk(lines, column, [&](int, bool exists, Global<T> there, Shared from) {
      if (exists) store(there.template as<uint4>(), load_shared<uint4>(from));
    });
    if (!BUG(staged_drain_late)) sync_warp();
  }
};

// Puts half of the tile's columns of the sums, from the left (0) or the right (1).
template <class S> PTX_D void put_half(const Staged<S>& staged, const typename S::Sums& c, int half) {
  static_assert(S::BN == 2 * STAGED);
#pragma unroll
  for (int j = 0; j < STAGED / 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int i = half * S::BN / 4 + 4 * j + 2 * h;
      staged.put(h, S::lane_column(j), c[i], c[i + 1]);
    }
}

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
