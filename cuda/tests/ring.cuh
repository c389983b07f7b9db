// A kernel of the tests' own in the style of sm_90: y[r] = w[e] x[r] for the rows r of every expert e, by a persistent
// grid of 128x128 tiles, a producer warpgroup (TMA, or cp.async for gathered rows) and two consumer warpgroups (wgmma),
// joined by a ring of mbarriers.
#pragma once
#include "ptx/ptx.cuh"

namespace ring {
using namespace ptx;

struct Params {
  TensorMap x, w, y;  // boxes of 64x128, 64x128 and 64x64 elements, swizzled
  Global<const bf16> rows;
  Global<const int> gather, offsets;
  Global<bf16> out;
  int experts, n, k;
};

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

// Tile t of all experts' tiles, walked upwards; the same in every thread.
struct Walk {
  const Params& p;
  int expert = 0, before = 0, begin = 0, end;
  int row = 0, column = 0;
  PTX_D Walk(const Params& p) : p(p), end(load_readonly(p.offsets + 1)) {}
  PTX_D bool to(int t) {
    const int wide = (p.n + tile - 1) / tile;
    for (int tiles; tiles = (end - begin + tile - 1) / tile * wide, t >= before + tiles;) {
      before += tiles;
      if (++expert == p.experts) return false;
      begin = end;
      end = load_readonly(p.offsets + (expert + 1));
    }
    row = begin + (t - before) / wide * tile;
    column = (t - before) % wide * tile;
    return true;
  }
};

PTX_D uint32_t swizzled(uint32_t row, uint32_t byte) { return row * 128 + (byte ^ (row & 7) << 4); }

template <bool GATHER> PTX_D void produce(const Params& p, int steps) {
  setmaxnreg_dec<56>();
  Walk walk(p);
  const int chunk = thread_id() % 8;
  int it = 0;
  if constexpr (!GATHER) {
    if (thread_id() >= 32 || !elect_one()) return;
    for (int t = block_id(); walk.to(t); t += block_count())
      for (int k = 0; k < steps; k++, it++) {
        const Slot s = slot(it);
        if (BUG(ring_producer_parity)) mbarrier_wait(s.empty, s.parity);
        else if (!BUG(ring_no_empty_wait)) mbarrier_wait(s.empty, s.parity ^ 1);
        mbarrier_arrive_expect(s.full, a_bytes + b_bytes - (BUG(ring_expects_less) ? 128 : 0) + (BUG(ring_expects_more) ? 128 : 0));
        tma_load(s.a, &p.x, s.full, k * depth, walk.row, 0);
        tma_load(s.b, &p.w, s.full, k * depth, walk.expert * p.n + walk.column, 0);
      }
  } else {
    for (int t = block_id(); walk.to(t); t += block_count()) {
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
          tma_load(s.b, &p.w, s.full, k * depth, walk.expert * p.n + walk.column, 0);
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
PTX_D void write(const Params& p, const Walk& walk, const float (&sum)[64], int group) {
  const int lane = thread_id() % 32, warp = thread_id() / 32 % 4;
  const Shared out = shared_memory() + c_at;
  for (int i = 0; i < 64; i += 2) {
    const uint32_t row = group * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
    store_shared(out + (column / 64 * tile * 128 + swizzled(row, column % 64 * 2)), pack<bf16>(sum[i], sum[i + 1]));
  }
  const bool whole = walk.row + group * 64 + 64 <= walk.end || BUG(ring_store_past_expert);
  if (!BUG(ring_store_no_fence)) fence_proxy_async();
  if (!BUG(ring_store_no_barrier)) bar_sync(1 + group, 128);
  if (whole) {
    if (warp == 0 && elect_one()) {
      for (int half = 0; half < 2 && walk.column + half * 64 < p.n; half++)
        tma_store(&p.y, out + (half * tile * 128 + group * 64 * 128), walk.column + half * 64, walk.row + group * 64, 0);
      tma_store_commit();
      if (!BUG(ring_store_no_wait)) tma_store_wait_read<0>();
    }
  } else {
    for (int i = thread_id() % 128; i < 64 * 16; i += 128) {
      const int row = group * 64 + i / 16, column = i % 16 * 8;
      if (walk.row + row < walk.end && walk.column + column < p.n)
        store((p.out + (static_cast<int64_t>(walk.row + row) * p.n + walk.column + column)).as<uint4>(),
              load_shared<uint4>(out + (column / 64 * tile * 128 + swizzled(row, column % 64 * 2))));
    }
  }
  if (!BUG(ring_store_no_release)) bar_sync(1 + group, 128);
}

template <bool GATHER> PTX_D void consume(const Params& p, int steps) {
  setmaxnreg_inc<224>();
  Walk walk(p);
  const int group = thread_id() / 128 - 1, lane = thread_id() % 32;
  float sum[64];
  int it = 0;
  for (int t = block_id(); walk.to(t); t += block_count()) {
    for (int k = 0; k < steps; k++, it++) {
      const Slot s = slot(it);
      if (BUG(ring_consumer_parity)) mbarrier_wait(s.full, s.parity ^ 1);
      else if (!BUG(ring_no_full_wait)) mbarrier_wait(s.full, s.parity);
      if (GATHER && !BUG(ring_gather_no_fence)) fence_proxy_async();  // cp.async writes as threads do
      if (!BUG(ring_no_wgmma_fence)) wgmma_fence();
      for (int j = 0; j < depth / 16; j++)
        wgmma<bf16, false, false>(sum, descriptor(s.a + (group * 64 * 128 + j * 32)), descriptor(s.b + j * (BUG(ring_descriptor_step) ? 16 : 32)),
                                  BUG(ring_accumulate) ? k > 0 : k + j > 0);
      wgmma_commit();
      if (BUG(ring_early_release) && lane == 0) mbarrier_arrive(s.empty);
      wgmma_wait<1>();
      if (!BUG(ring_early_release) && k > 0 && lane == 0) mbarrier_arrive(slot(it - 1).empty);
    }
    if (!BUG(ring_no_last_wait)) wgmma_wait<0>();
    if (!BUG(ring_early_release) && !BUG(ring_no_last_release) && lane == 0) mbarrier_arrive(slot(it - 1).empty);
    write(p, walk, sum, group);
  }
  if (BUG(ring_no_last_wait)) wgmma_wait<0>();
}

template <bool GATHER> PTX_D void grouped(const Params& p) {
  if (thread_id() == 0) {
    for (int s = 0; s < stages; s++) {
      mbarrier_init(slot(s).full, GATHER ? 129 : 1);
      mbarrier_init(slot(s).empty, 8);
    }
    if (!BUG(ring_no_init_fence)) fence_mbarrier_init();
  }
  if (!BUG(ring_no_init_barrier)) sync_block();
  const int steps = (p.k + depth - 1) / depth;
  if (thread_id() < 128) produce<GATHER>(p, steps);
  else consume<GATHER>(p, steps);
}

PTX_KERNEL(test_ring, ring::threads, 1, ring::shared_bytes, grouped<false>, Params)
PTX_KERNEL(test_ring_gather, ring::threads, 1, ring::shared_bytes, grouped<true>, Params)

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
