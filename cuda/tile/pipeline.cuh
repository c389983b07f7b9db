// The life of a block of warpgroups (sm_90a): the first one copies slices of tile after tile into a ring in shared memory,
// the others multiply them and store the sums. Two barriers for each place of the ring say when it is full and when empty.
#pragma once
#include "tile/results.cuh"
#include "tile/tensor_boxes.cuh"

namespace tile {

// A place in the ring, and the parity of the round.
template <class S> struct Stage {
  int index = 0;
  uint32_t parity = 0;

  PTX_D Shared slice() const { return shared_memory() + index * S::STAGE_BYTES; }
  PTX_D Shared full() const { return shared_memory() + (S::BARRIERS_AT + index * 8); }
  PTX_D Shared empty() const { return full() + S::STAGES * 8; }
  PTX_D void advance() {
    if (++index < S::STAGES) return;
    index = 0;
    parity ^= 1;
  }
};

// Threads of the first warpgroup that copy, or ask for copies.
template <class A, class B> constexpr int COPIERS = BY_THREADS<A> || BY_THREADS<B> ? WARPGROUP : 32;

template <class S, class Kernel, class A, class B> PTX_D void copy_tiles(const Kernel& kernel, A a, B b) {
  Stage<S> stage;
  auto walk = kernel.walk();
  typename decltype(walk)::Tile tile;
  while (walk.next(tile)) {
    const int slices = ceil_div(kernel.start(tile, a, b), S::SLICE);
    for (int s = 0; s < slices; s++, stage.advance()) {
      if (!BUG(pipeline_no_empty_wait)) mbarrier_wait(stage.empty(), stage.parity ^ 1);
      b.copy(stage.slice() + S::A_BYTES, stage.full(), tile.shares);  // has the longer way
      a.copy(stage.slice(), stage.full(), false);
      cp_async_mbarrier_arrive(stage.full());
    }
  }
}

// The descriptors of an operand in the ring, that of its first 16 elements along K and those further on: they differ in
// their lower words alone, by an address in units of 16 bytes. A warp knows them to be the same in all its lanes.
template <class S, Major MAJOR> struct RingOperand {
  static constexpr bool TRANSPOSED = MAJOR == Major::MN;
  static constexpr int STEP_BYTES = TRANSPOSED ? 16 * BOX_ROW_BYTES : 32;
  uint32_t low, high;

  explicit PTX_D RingOperand(Shared at) {
    const uint64_t first = TRANSPOSED ? descriptor_transposed(at, S::SLICE * BOX_ROW_BYTES) : descriptor(at);
    low = shfl(static_cast<uint32_t>(first), 0);
    high = static_cast<uint32_t>(first >> 32);
  }
  PTX_D uint64_t at(int stage, int step) const {
    return static_cast<uint64_t>(high) << 32 | (low + stage * (S::STAGE_BYTES >> 4) + (step * STEP_BYTES >> 4));
  }
};

constexpr int STEP = 16;  // of wgmma along K, in elements
template <class S> constexpr int STEPS = S::SLICE / STEP;

// c = A B^T of N steps of a slice from `first` on, as far as the warpgroup's rows and the columns of c are concerned, plus c
// where it `adds`; does not wait for it. FENCE: threads have copied it.
template <class S, Major MA, Major MB, bool FENCE, int N, int SUMS>
PTX_D void multiply(float (&c)[SUMS], const RingOperand<S, MA>& a, const RingOperand<S, MB>& b, int stage, int first, bool adds) {
  if (FENCE && !BUG(pipeline_no_fence)) fence_proxy_async();  // cp.async writes as threads do
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < N; step++)
    wgmma<typename S::Element, a.TRANSPOSED, b.TRANSPOSED>(c, a.at(stage, first + step), b.at(stage, BUG(pipeline_step) ? 0 : first + step), adds || step > 0);
  wgmma_commit();
}

// The sums of the left half of a tile's columns.
template <int SUMS> PTX_D auto left_half(float (&c)[SUMS]) -> float (&)[SUMS / 2] { return reinterpret_cast<float (&)[SUMS / 2]>(c); }

// A warpgroup that has no rows of a tile only says that it is done with the slices. Of a tile that ends in its left half the
// right one is not multiplied. Both blocks of the cluster hear when either is done with a place, since either may fill it for
// both.
template <class S, Major MA, Major MB, bool FENCE, class Kernel> PTX_D void multiply_tiles(const Kernel& kernel) {
  Stage<S> stage;
  auto walk = kernel.walk();
  typename decltype(walk)::Tile tile;
  NoBoxes<S::BM> rows;
  NoBoxes<S::BN> columns;
  typename Kernel::Results results;
  const RingOperand<S, MA> a(shared_memory() + S::group() * GROUP_ROWS * BOX_ROW_BYTES);
  const RingOperand<S, MB> b(shared_memory() + S::A_BYTES);
  const auto release = [](Shared empty) {
    const int lane = thread_id() % 32;
    if (lane < 2 - BUG(pipeline_release_one_block)) mbarrier_release_at(empty, BUG(pipeline_release_own) ? cluster_rank() : lane);
  };
  while (walk.next(tile)) {
    // Whole slices, and the steps of a last one.
    const int steps = ceil_div(kernel.start(tile, rows, columns), STEP), slices = steps / STEPS<S>, left = steps % STEPS<S>;
    const bool has_rows = S::group() * GROUP_ROWS < kernel.height(tile);
    if (has_rows) kernel.prefetch(tile, results);
    const bool whole = columns.has_right && !BUG(pipeline_left_half);
    typename S::Sums sums;
    if (steps == 0 || !whole)
#pragma unroll
      for (float& sum : sums) sum = 0;
    const auto multiply_slices = [&](auto& c) {
      Shared last = stage.empty();
      for (int s = 0; s < slices; s++, stage.advance()) {
        if (!BUG(pipeline_no_full_wait)) mbarrier_wait(stage.full(), stage.parity);
        if (has_rows) {
          multiply<S, MA, MB, FENCE, STEPS<S>>(c, a, b, stage.index, 0, s > 0 || BUG(pipeline_adds_to_last));
          if (BUG(pipeline_early_release)) release(stage.empty());
          wgmma_wait<1>();
        } else {
          sync_warp();  // lanes that lag behind must not miss the round
        }
        if (s > 0 && !BUG(pipeline_early_release)) release(last);
        last = stage.empty();
      }
      if (!BUG(pipeline_no_last_wait)) wgmma_wait<0>();
      if (slices > 0 && !BUG(pipeline_early_release)) release(last);
      if (left > 0) {
        mbarrier_wait(stage.full(), stage.parity);
        if (has_rows) {
#pragma unroll 1
          for (int step = 0; step < left - BUG(pipeline_short_slice); step++) {
            multiply<S, MA, MB, FENCE, 1>(c, a, b, stage.index, step, slices + step > 0);
            wgmma_wait<1>();
          }
          wgmma_wait<0>();
        } else {
          sync_warp();
        }
        release(stage.empty());
        stage.advance();
      }
    };
    if (whole) multiply_slices(sums);
    else multiply_slices(left_half(sums));
    if (has_rows) kernel.finish(tile, sums, results);
  }
  if (leads_warp()) tma_store_wait<0>();
}

// `kernel` as in persistent.cuh, without `begin`, and
//   Results                       what a warp keeps of its boxes; the third argument of finish
//   void prefetch(tile, results)  before the product of a tile of which the warpgroup has rows
//   int height(tile)              rows of C from the tile's first on
template <class S, Major MA, Major MB, class Kernel, class A, class B> PTX_D void run_pipeline(const Kernel& kernel, A a, B b) {
  if (thread_id() == 0) {
    Stage<S> stage;
    for (int i = 0; i < S::STAGES; i++, stage.advance()) {
      mbarrier_init(stage.full(), COPIERS<A, B>);
      mbarrier_init(stage.empty(), 2 * 4 * S::GROUPS);
    }
    for (int i = 0; i < 4 * S::GROUPS * 2; i++) mbarrier_init(S::loaded(i / 2, i % 2), 1);
    fence_mbarrier_init();
  }
  if (!BUG(pipeline_no_first_sync)) sync_cluster();
  // Registers of a thread of the copying warpgroup, and of the others, which take what is left of all.
  constexpr int OF_COPIERS = BY_THREADS<A> || BY_THREADS<B> ? 56 : 40, OF_OTHERS = (504 - OF_COPIERS) / S::GROUPS;
  if (thread_id() < WARPGROUP) {
    setmaxnreg_dec<OF_COPIERS>();
    if (thread_id() < COPIERS<A, B>) copy_tiles<S>(kernel, a, b);
  } else {
    setmaxnreg_inc<OF_OTHERS>();
    multiply_tiles<S, MA, MB, BY_THREADS<A> || BY_THREADS<B>>(kernel);
  }
  if (!BUG(pipeline_no_last_sync)) sync_cluster();  // the other block still says when it is done with places
}

}  // namespace tile
