// A kernel of the tests' own in the style of sm_90: y[r] = w[e] x[r] for the rows r of every expert e, by a persistent
// grid of 128x128 tiles, a producer warpgroup (TMA, or cp.async for gathered rows) and two consumer warpgroups (wgmma),
// joined by a ring of mbarriers. The blocks of a pair work on neighbouring rows and share the slices of w: each loads one
// half for both.
#pragma once
#include "ptx/ptx.cuh"

namespace ring {
using namespace ptx;

struct Params {
  TensorMap x, w, y;  // boxes of 64x128, 64x128 (64x64 in pairs) and 64x64 elements, swizzled; w has a matrix per expert
  Global<const bf16> rows;
  Global<const int> gather, offsets;
  Global<bf16> out;
  int experts, n, k;
};

enum Kind { plain, gathered, paired };
constexpr int stages = 3, tile = 128, depth = 64, threads = 384;
constexpr uint32_t a_bytes = tile * depth * 2, b_bytes = tile * depth * 2, c_bytes = tile * tile * 2;
constexpr uint32_t shared_bytes = stages * (a_bytes + b_bytes) + c_bytes + 2 * stages * 8;
constexpr uint32_t a_at = 0, b_at = stages * a_bytes, c_at = b_at + stages * b_bytes, full_at = c_at + c_bytes, empty_at = full_at + stages * 8;

// The stage of step `it`, and the parity of its round.
struct Slot {
  Shared a, b, full, empty;
  uint32_t parity;
};
PTX_D Slot slot(int it) {
  const uint32_t s = it % stages;
  const Shared base = shared_memory();
  return {base + (a_at + s * a_bytes), base + (b_at + s * b_bytes), base + (full_at + s * 8), base + (empty_at + s * 8),
          static_cast<uint32_t>(it / stages & 1)};
}

struct Place {
  int expert = 0, row = 0, column = 0, end = 0;  // of a tile; where the expert's rows end
};

// The tiles of all experts that are this block's, walked upwards; the same in every thread. The second block of a pair has
// the rows below those of the first one, perhaps none.
template <Kind KIND> struct Walk : Place {
  static constexpr int blocks = KIND == paired ? 2 : 1, rows = tile * blocks;
  const Params& p;
  int next = block_id() / blocks, before = 0, begin = 0;
  PTX_D Walk(const Params& p) : p(p) { end = load_readonly(p.offsets + 1); }
  PTX_D bool step() {
    const int wide = (p.n + tile - 1) / tile, t = next;
    next += block_count() / blocks;
    for (int tiles; tiles = (end - begin + rows - 1) / rows * wide, t >= before + tiles;) {
      before += tiles;
      if (++expert == p.experts) return false;
      begin = end;
      end = load_readonly(p.offsets + (expert + 1));
    }
    row = begin + (t - before) / wide * rows + block_id() % blocks * tile;
    column = (t - before) % wide * tile;
    return true;
  }
};

PTX_D uint32_t swizzled(uint32_t row, uint32_t byte) { return row * 128 + (byte ^ (row & 7) << 4); }

// Half of a slice of w, for both blocks of the pair.
PTX_D void load_half(const Params& p, const Slot& s, int k, int row, int expert) {
  const int half = BUG(ring_pair_same_half) ? 0 : cluster_rank(), place = BUG(ring_pair_same_place) ? 0 : cluster_rank();
  const Shared to = s.b + place * (b_bytes / 2);
  if (BUG(ring_pair_loads_alone)) tma_load(to, &p.w, s.full, k * depth, row + half * (tile / 2), expert);
  else tma_load_pair(to, &p.w, s.full, k * depth, row + half * (tile / 2), expert);
}

template <Kind KIND> PTX_D void produce(const Params& p, int steps) {
  setmaxnreg_dec<56>();
  Walk<KIND> walk(p);
  const int chunk = thread_id() % 8;
  int it = 0;
  if constexpr (KIND != gathered) {
    if (thread_id() >= 32 || !elect_one()) return;
    while (walk.step())
      for (int k = 0; k < steps; k++, it++) {
        const Slot s = slot(it);
        if (BUG(ring_producer_parity)) mbarrier_wait(s.empty, s.parity);
        else if (!BUG(ring_no_empty_wait)) mbarrier_wait(s.empty, s.parity ^ 1);
        const uint32_t b = KIND == paired && BUG(ring_pair_expects_half) ? b_bytes / 2 : b_bytes;
        mbarrier_arrive_expect(s.full, a_bytes + b - (BUG(ring_expects_less) ? 128 : 0) + (BUG(ring_expects_more) ? 128 : 0));
        tma_load(s.a, &p.x, s.full, k * depth, walk.row, 0);
        if constexpr (KIND == paired) load_half(p, s, k, walk.column, walk.expert);
        else tma_load(s.b, &p.w, s.full, k * depth, walk.column, BUG(ring_wrong_matrix) ? 0 : walk.expert);
      }
  } else {
    while (walk.step()) {
      int source[8];
      for (int i = 0; i < 8; i++) {
        const int r = walk.row + thread_id() / 8 + i * 16;
        source[i] = r < walk.end ? load_readonly(p.gather + r) : -1;
      }
      for (int k = 0; k < steps; k++, it++) {
        const Slot s = slot(it);
        mbarrier_wait(s.empty, s.parity ^ 1);
        if (thread_id() == 0) {
          mbarrier_arrive_expect(s.full, b_bytes);
          tma_load(s.b, &p.w, s.full, k * depth, walk.column, walk.expert);
        }
        for (int i = 0; i < 8; i++) {
          const int r = thread_id() / 8 + i * 16, c = k * depth + chunk * 8;
          const bool inside = source[i] >= 0 && (BUG(ring_gather_no_tail) || c < p.k);
          const auto from = inside ? p.rows + (static_cast<int64_t>(source[i]) * p.k + c) : p.rows;
          cp_async<16>(s.a + (BUG(ring_gather_swizzle) ? r * 128 + chunk * 16 : swizzled(r, chunk * 16)), from.as<const void>(), inside);
        }
        if (BUG(ring_gather_plain_arrive)) {
          cp_async_commit();
          mbarrier_arrive(s.full);
        } else {
          cp_async_mbarrier_arrive(s.full);
        }
      }
    }
    if (BUG(ring_gather_plain_arrive)) cp_async_wait<0>();
  }
}

// Accumulators to shared memory, and from there by TMA where all 64 rows are the expert's, else row by row.
PTX_D void write(const Params& p, const Place& place, const float (&sum)[64], int group) {
  const int lane = thread_id() % 32, warp = thread_id() / 32 % 4;
  const Shared out = shared_memory() + c_at;
  for (int i = 0; i < 64; i += 2) {
    const uint32_t row = group * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
    store_shared(out + (column / 64 * tile * 128 + swizzled(row, column % 64 * 2)), pack<bf16>(sum[i], sum[i + 1]));
  }
  const bool whole = place.row + group * 64 + 64 <= place.end || BUG(ring_store_past_expert);
  if (!BUG(ring_store_no_fence)) fence_proxy_async();
  if (!BUG(ring_store_no_barrier)) bar_sync(1 + group, 128);
  if (whole) {
    if (warp == 0 && elect_one()) {
      for (int half = 0; half < 2 && place.column + half * 64 < p.n; half++)
        tma_store(&p.y, out + (half * tile * 128 + group * 64 * 128), place.column + half * 64, place.row + group * 64, 0);
      tma_store_commit();
      if (!BUG(ring_store_no_wait)) tma_store_wait_read<0>();
    }
  } else {
    for (int i = thread_id() % 128; i < 64 * 16; i += 128) {
      const int row = group * 64 + i / 16, column = i % 16 * 8;
      if (place.row + row < place.end && place.column + column < p.n)
        store((p.out + (static_cast<int64_t>(place.row + row) * p.n + place.column + column)).as<uint4>(),
              load_shared<uint4>(out + (column / 64 * tile * 128 + swizzled(row, column % 64 * 2))));
    }
  }
  if (!BUG(ring_store_no_release)) bar_sync(1 + group, 128);
}

// Gives a place of the ring back to all who fill it.
template <Kind KIND> PTX_D void release(const Slot& s) {
  if constexpr (KIND == paired) {
    mbarrier_release_at(s.empty, cluster_rank());
    if (!BUG(ring_pair_releases_once)) mbarrier_release_at(s.empty, cluster_rank() ^ (BUG(ring_pair_releases_own) ? 0 : 1));
  } else {
    mbarrier_arrive(s.empty);
  }
}

template <Kind KIND> PTX_D void consume(const Params& p, int steps) {
  setmaxnreg_inc<224>();
  Walk<KIND> walk(p);
  const int group = thread_id() / 128 - 1, lane = thread_id() % 32;
  float sum[64];
  int it = 0;
  while (walk.step()) {
    for (int k = 0; k < steps; k++, it++) {
      const Slot s = slot(it);
      if (BUG(ring_consumer_parity)) mbarrier_wait(s.full, s.parity ^ 1);
      else if (!BUG(ring_no_full_wait)) mbarrier_wait(s.full, s.parity);
      if (KIND == gathered && !BUG(ring_gather_no_fence)) fence_proxy_async();  // cp.async writes as threads do
      if (!BUG(ring_no_wgmma_fence)) wgmma_fence();
      for (int j = 0; j < depth / 16; j++)
        wgmma<bf16, false, false>(sum, descriptor(s.a + (group * 64 * 128 + j * 32)), descriptor(s.b + j * (BUG(ring_descriptor_step) ? 16 : 32)),
                                  BUG(ring_accumulate) ? k > 0 : k + j > 0);
      wgmma_commit();
      if (BUG(ring_early_release) && lane == 0) release<KIND>(s);
      wgmma_wait<1>();
      if (!BUG(ring_early_release) && k > 0 && lane == 0) release<KIND>(slot(it - 1));
    }
    if (!BUG(ring_no_last_wait)) wgmma_wait<0>();
    if (!BUG(ring_early_release) && !BUG(ring_no_last_release) && lane == 0) release<KIND>(slot(it - 1));
    write(p, walk, sum, group);
  }
  if (BUG(ring_no_last_wait)) wgmma_wait<0>();
}

template <Kind KIND> PTX_D void grouped(const Params& p) {
  if (thread_id() == 0) {
    for (int s = 0; s < stages; s++) {
      mbarrier_init(slot(s).full, KIND == gathered ? 129 : 1);
      mbarrier_init(slot(s).empty, 8 * Walk<KIND>::blocks);
    }
    if (!BUG(ring_no_init_fence)) fence_mbarrier_init();
  }
  if (KIND == paired && !BUG(ring_pair_no_first_sync)) sync_cluster();
  else if (!BUG(ring_no_init_barrier)) sync_block();
  const int steps = (p.k + depth - 1) / depth;
  if (thread_id() < 128) produce<KIND>(p, steps);
  else consume<KIND>(p, steps);
  if (KIND == paired && !BUG(ring_pair_no_last_sync)) sync_cluster();
}

PTX_KERNEL(test_ring, ring::threads, 1, ring::shared_bytes, grouped<plain>, Params)
PTX_KERNEL(test_ring_gather, ring::threads, 1, ring::shared_bytes, grouped<gathered>, Params)
PTX_CLUSTER_KERNEL(test_ring_pair, ring::threads, 1, ring::shared_bytes, grouped<paired>, Params)

// y [64, 128] = a [64, K-major 64]^T b: both operands MN-major, as weight gradients have them.
struct TransposedParams {
  TensorMap a, b;  // [64, 64] and [64, 128], boxes of 64x64
  Global<float> y;
};
template <class T> PTX_D void transposed(const TransposedParams& p) {
  const Shared a = shared_memory(), b = a + 8192u, full = b + 16384u;
  if (thread_id() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, 8192 + 16384);
    tma_load(a, &p.a, full, 0, 0, 0);
    tma_load(b, &p.b, full, 0, 0, 0);
    tma_load(b + 8192u, &p.b, full, 64, 0, 0);
  }
  sync_block();
  mbarrier_wait(full, 0);
  float sum[64];
  wgmma_fence();
  for (int j = 0; j < 4; j++)
    wgmma<T, true, true>(sum, descriptor_transposed(a + j * 2048, 8192),
                         descriptor_transposed(b + j * 2048, BUG(ring_transposed_stride) ? 4096 : 8192), j > 0);
  wgmma_commit();
  wgmma_wait<0>();
  const int lane = thread_id() % 32, warp = thread_id() / 32;
  for (int i = 0; i < 64; i++) store(p.y + ((warp * 16 + lane / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2), sum[i]);
}
PTX_KERNEL(test_transposed_bf16, 128, 1, 8192 + 16384 + 8, transposed<bf16>, TransposedParams)
PTX_KERNEL(test_transposed_f16, 128, 1, 8192 + 16384 + 8, transposed<f16>, TransposedParams)

}  // namespace ring
