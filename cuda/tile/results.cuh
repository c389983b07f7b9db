// The way of a warp's results to memory: by boxes of its 16 rows and 64 columns in shared memory, which TMA stores while the
// warp goes on. The first lane asks for the stores; what it asks for between two commits is a group.
#pragma once
#include "tile/warpgroups.cuh"

namespace tile {

// A matrix in memory in which results belong, its rows `pitch` elements apart; `map` is of the same, with boxes of 16 rows.
template <class T> struct Target {
  const TensorMap& map;
  Global<T> first;
  int64_t pitch;
  int columns;
};

template <class S> struct ResultBox {
  using T = typename S::Element;
  static constexpr uint32_t BYTES = WARP_ROWS * BOX_ROW_BYTES;
  Shared base;

  // The i-th of the warp's.
  PTX_D static ResultBox of_warp(uint32_t i) {
    return {shared_memory() + (S::RESULTS_AT + S::warp_row() * S::BUFFERS * BOX_ROW_BYTES + i * BYTES)};
  }
  PTX_D Shared at(int row, int byte) const { return base + (row * BOX_ROW_BYTES + (byte ^ (row & 7) << 4)); }

  // Single elements, or `column` and the next one where it is even, of row h of the thread.
  PTX_D void put_one(int h, int column, float value) const { store_shared(at(S::lane_row(h), 2 * column), from_float<T>(value)); }
  PTX_D void put_pair(int h, int column, float first, float second) const {
    store_shared(at(S::lane_row(h), 2 * column), pack<T>(first, second));
  }
  PTX_D uint32_t get_pair(int h, int column) const { return load_shared<uint32_t>(at(S::lane_row(h), 2 * column)); }

  // What the thread has of 16 columns, number `block` of them: [i] of row i % 2 and column lane_column(i / 2), and the next.
  using Block = float[4][2];
  PTX_D void put(int block, const Block& values) const {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = pack<T>(values[i][0], values[i][1]);
    put(block, r);
  }
  PTX_D void put(int block, const uint32_t (&pairs)[4]) const { stmatrix_x4(matrices(block), pairs); }
  PTX_D void get(int block, Block& values) const {
    uint32_t r[4];
    ldmatrix_x4(r, matrices(block));
#pragma unroll
    for (int i = 0; i < 4; i++) values[i][0] = low_half<T>(r[i]), values[i][1] = high_half<T>(r[i]);
  }
  // The row that the lane gives of the four matrices of a block: those of its left half, then those of its right one.
  PTX_D Shared matrices(int block) const {
    const int lane = thread_id() % 32;
    return at(lane % 16, block * 32 + (BUG(results_matrices) ? lane / 8 % 2 : lane / 16) * 16);
  }

  // At `column` of `row` of matrix z, as far as the tensor goes.
  PTX_D void store(const TensorMap& map, int column, int row, int z) const {
    if (leads_warp()) tma_store(&map, base, column, row, z);
  }
  // The same, its rows below `end`: where it has others as well, all lanes store instead.
  PTX_D void store(const Target<T>& target, int column, int row, int end) const {
    if (row + WARP_ROWS <= end || BUG(results_past_end)) return store(target.map, column, row, 0);
    const int chunk = thread_id() % 8, left = column + chunk * S::CHUNK;
    for (int i = thread_id() % 32 / 8; i < WARP_ROWS && row + i < end && left < target.columns; i += 4)
      ptx::store((target.first + ((row + i) * target.pitch + left)).template as<uint4>(), load_shared<uint4>(at(i, chunk * CHUNK_BYTES)));
  }
};

// Fills a box with the sums of columns 64 `quarter` and on of the tile.
template <class S, class Box> PTX_D void put_sums(const Box& box, const typename S::Sums& c, int quarter) {
  using T = typename S::Element;
#pragma unroll
  for (int block = 0; block < BOX / 16; block++) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = quarter * BOX / 2 + 8 * block + 2 * i;
      pairs[i] = pack<T>(c[at], c[at + 1]);
    }
    box.put(block, pairs);
  }
}

// Boxes have been filled, and may be stored.
PTX_D void boxes_are_full() {
  if (!BUG(results_no_fence)) fence_proxy_async();
  if (!BUG(results_no_sync)) sync_warp();
}
// Waits until at most N of the newest groups are still to be read; others' boxes may be filled again.
template <int N> PTX_D void boxes_are_free() {
  if (leads_warp() && !BUG(results_no_wait)) tma_store_wait_read<N>();
  sync_warp();
}

// The boxes of a warp used by turns, each a group of its own.
template <class S> class ResultRing {
  uint32_t turn = 0;

 public:
  PTX_D ResultBox<S> next() {
    boxes_are_free<S::BUFFERS - 1>();
    const ResultBox<S> box = ResultBox<S>::of_warp(turn);
    turn = turn + 1 == S::BUFFERS ? 0 : turn + 1;
    return box;
  }
  // Stores a box that is full; as ResultBox::store.
  template <class To> PTX_D void store(const ResultBox<S>& box, const To& to, int column, int row, int last) {
    boxes_are_full();
    box.store(to, column, row, last);
    if (leads_warp()) tma_store_commit();
  }
};

// A warpgroup's 64 rows and 64 columns of results, the other way round.
template <class S> struct TransposedBox {
  static constexpr uint32_t BYTES = GROUP_ROWS * BOX_ROW_BYTES;
  Shared base;

  // As ResultBox: a row of a matrix is a column of the tile, and has 8 of the warp's rows.
  PTX_D void put(int block, const uint32_t (&pairs)[4]) const {
    const int lane = thread_id() % 32, warp = thread_id() / 32 % 4, row = block * 16 + lane / 16 * 8 + lane % 8;
    const int byte = warp * 32 + (BUG(results_transposed) ? lane / 16 : lane / 8 % 2) * 16;
    stmatrix_x4_trans(base + (row * BOX_ROW_BYTES + (byte ^ (row & 7) << 4)), pairs);
  }
};

// The boxes of a warpgroup used by turns, filled by its warps together and stored by the first one's first lane.
template <class S> class TransposedRing {
  uint32_t turn = 0;

  PTX_D static bool leads() { return thread_id() % WARPGROUP == 0; }
  PTX_D static void sync() {
    if (S::group() == 0) bar_sync(1, WARPGROUP);
    else bar_sync(2, WARPGROUP);
  }

 public:
  PTX_D TransposedBox<S> next() {
    if (leads() && !BUG(results_no_wait)) tma_store_wait_read<S::BUFFERS - 1>();
    sync();
    const TransposedBox<S> box{shared_memory() + (S::RESULTS_AT + (S::group() * S::BUFFERS + turn) * TransposedBox<S>::BYTES)};
    turn = turn + 1 == S::BUFFERS ? 0 : turn + 1;
    return box;
  }
  // `row` is the first of the warp's, `column` of the box's, in the tile.
  PTX_D void store(const TransposedBox<S>& box, const TensorMap& map, int column, int row, int z) {
    fence_proxy_async();
    if (!BUG(results_transposed_no_sync)) sync();
    if (leads()) {
      tma_store(&map, box.base, row, column, z);
      tma_store_commit();
    }
  }
};

}  // namespace tile
