// One small kernel per group of instructions, which writes all that they return. On the CPU their results are held
// against the definitions (test_instructions.cpp); on a GPU, against the CPU's (tests/gpu/conformance).
#pragma once
#include "ptx/ptx.cuh"

namespace probes {
using namespace ptx;

struct Params {
  TensorMap from, to;  // 16-bit [2, 64, 64] over `in` and `out`, boxes of 64x64, swizzled
  Global<const uint32_t> in;
  Global<uint32_t> out;
};
enum { in_words = 4096, out_words = 8192 };

PTX_D uint32_t word(const Params& p, int i) { return load_readonly(p.in + i); }
// Result number `i` of this thread.
PTX_D void put(const Params& p, int i, uint32_t value) { store(p.out + (i * block_threads() + thread_id()), value); }
// All NaN alike: which one an operation gives is the machine's own affair.
PTX_D void put(const Params& p, int i, float value) { put(p, i, value != value ? 0x7fffffffu : float_bits(value)); }
// A whole number from -8 to 8, so that products and their sums are exact in any order.
PTX_D float whole(uint32_t x) { return static_cast<float>(static_cast<int>(x % 17) - 8); }

PTX_D void lanes(const Params& p) {
  const int t = thread_id(), lane = t % 32;
  const uint32_t x = word(p, t);
  put(p, 0, shfl(x, (lane * 7 + 3) % 32));
  put(p, 1, shfl_xor(x, 5));
  put(p, 2, shfl_up(x, 3));
  put(p, 3, ptx::ballot(x % 3 == 0));
  put(p, 4, match_any(x % 5));
  put(p, 5, redux_max(x));
  put(p, 6, redux_min(x));
  put(p, 7, static_cast<uint32_t>(redux_add(static_cast<int>(x))));
  put(p, 8, static_cast<uint32_t>(popcount(x)));
  put(p, 9, static_cast<uint32_t>(lowest_bit(x | 1u << 31)));
}
PTX_KERNEL(probe_lanes, 64, 1, 16, lanes, Params)

PTX_D void conversions(const Params& p) {
  const float x = bits_float(word(p, thread_id())), y = bits_float(word(p, thread_id() + 128));
  put(p, 0, static_cast<uint32_t>(from_float<bf16>(x).bits));
  put(p, 1, static_cast<uint32_t>(from_float<f16>(x).bits));
  put(p, 2, pack<bf16>(x, y));
  put(p, 3, pack<f16>(x, y));
  put(p, 4, to_float(bf16{static_cast<uint16_t>(float_bits(y))}));
  put(p, 5, low_half<f16>(pack<f16>(x, y)));
  put(p, 6, high_half<bf16>(pack<bf16>(x, y)));
  put(p, 7, to_tf32(x));
}
PTX_KERNEL(probe_conversions, 128, 1, 16, conversions, Params)

PTX_D void arithmetic(const Params& p) {
  const float x = bits_float(word(p, thread_id())), y = bits_float(word(p, thread_id() + 128)), z = bits_float(word(p, thread_id() + 256));
  put(p, 0, add_rn(x, y));
  put(p, 1, mul_rn(x, y));
  put(p, 2, div_rn(x, y));
  put(p, 3, fma_rn(x, y, z));
  put(p, 4, sqrt_rn(x));
}
PTX_KERNEL(probe_arithmetic, 128, 1, 16, arithmetic, Params)

// Compared within the documented errors, not to the bit.
PTX_D void approximations(const Params& p) {
  const float x = whole(word(p, thread_id())) + whole(word(p, thread_id() + 128)) / 16 + 0.03125f;
  put(p, 0, exp2_approx(x));
  put(p, 1, rcp_approx(x));
  put(p, 2, tanh_approx(x / 4));
  put(p, 3, ptx::erf(x / 4));
}
PTX_KERNEL(probe_approximations, 128, 1, 16, approximations, Params)

PTX_D void memory(const Params& p) {
  const int t = thread_id();
  const Shared own = shared_memory() + t * 16;
  store_shared(own, load_readonly((p.in + t * 4).as<const uint4>()));
  sync_block();
  const uint4 other = load_shared<uint4>(shared_memory() + (t ^ 33) * 16);
  store((p.out + t * 4).as<uint4>(), other);
  const uint4 streamed = load_streaming((p.in + t * 4).as<const uint4>());
  put(p, 4, streamed.w);
  sync_block();
  if (t < 2) store_shared(shared_memory() + t * 4, t ? 1000 : 0);
  sync_block();
  const int x = static_cast<int>(word(p, t) % 900);
  atomic_add_shared(shared_memory(), x);
  atomic_min_shared(shared_memory() + 4, x);
  sync_block();
  put(p, 5, load_shared<uint32_t>(shared_memory() + t % 2 * 4));
}
PTX_KERNEL(probe_memory, 64, 1, 1024, memory, Params)

// Sizes 16, 8 and 4; every third copy is switched off and writes zeros.
PTX_D void copies(const Params& p) {
  const int t = thread_id();
  const Shared at = shared_memory() + t * 32;
  const bool on = t % 3 != 0;
  if (t % 4 == 0) cp_async<16, 256>(at, (p.in + t * 8).as<const void>(), on);
  else cp_async<16>(at, (p.in + t * 8).as<const void>(), on);
  cp_async_commit();
  cp_async<8>(at + 16, (p.in + (t * 8 + 4)).as<const void>(), on);
  cp_async<4>(at + 24, (p.in + (t * 8 + 6)).as<const void>(), on);
  cp_async<4>(at + 28, (p.in + (t * 8 + 7)).as<const void>(), !on);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  for (int i = 0; i < 8; i++) put(p, i, load_shared<uint32_t>(shared_memory() + (t ^ 1) * 32 + i * 4));
}
PTX_KERNEL(probe_copies, 64, 1, 2048, copies, Params)

PTX_D void matrices(const Params& p) {
  const int t = thread_id();
  store_shared(shared_memory() + t * 16, load_readonly((p.in + t * 4).as<const uint4>()));
  sync_warp();
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + (t * 5 % 32) * 16);
  for (int i = 0; i < 4; i++) put(p, i, r[i]);
  ldmatrix_x4_trans(r, shared_memory() + (t * 5 % 32) * 16);
  for (int i = 0; i < 4; i++) put(p, 4 + i, r[i]);
}
PTX_KERNEL(probe_matrices, 32, 1, 512, matrices, Params)

template <class T> PTX_D uint32_t operand(const Params& p, int i) {
  const float low = whole(word(p, i)), high = whole(word(p, i + 1024));
  if constexpr (sizeof(T) == 2) return pack<T>(low, high);
  else return to_tf32(low);
}
template <class T> PTX_D void products(const Params& p) {
  const int t = thread_id();
  uint32_t a[2][4], b[2][2];
  float c[2][2][4], single[4];
  for (int i = 0; i < 8; i++) a[i / 4][i % 4] = operand<T>(p, t + i * 32);
  for (int i = 0; i < 4; i++) b[i / 2][i % 2] = operand<T>(p, t + 256 + i * 32);
  for (int i = 0; i < 16; i++) c[i / 8][i / 4 % 2][i % 4] = whole(word(p, t + 512 + i * 16));
  for (int i = 0; i < 4; i++) single[i] = c[1][0][i];
  mma<T>(single, a[1], b[0]);
  mma_tile<T>(c, a, b);
  for (int i = 0; i < 16; i++) put(p, i, c[i / 8][i / 4 % 2][i % 4]);
  for (int i = 0; i < 4; i++) put(p, 16 + i, single[i]);
}
PTX_KERNEL(probe_products_bf16, 32, 1, 16, products<bf16>, Params)
PTX_KERNEL(probe_products_f16, 32, 1, 16, products<f16>, Params)
PTX_KERNEL(probe_products_tf32, 32, 1, 16, products<float>, Params)

// One warp hands a value on to the other at a named barrier without waiting for it.
PTX_D void named_barriers(const Params& p) {
  const int t = thread_id();
  if (t < 32) {
    store_shared(shared_memory() + t * 4, word(p, t));
    bar_arrive(3, 64);
  } else {
    bar_sync(3, 64);
    store(p.out + t, load_shared<uint32_t>(shared_memory() + (t ^ 17) % 32 * 4));
  }
}
PTX_KERNEL(probe_named_barriers, 64, 1, 128, named_barriers, Params)

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
PTX_D void stored_matrices(const Params& p) {
  const int t = thread_id();
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = word(p, i * 32 + t);
  const Shared row = shared_memory() + (t * 5 % 32) * 16;
  stmatrix_x4(row, r);
  stmatrix_x4_trans(row + 512, r);
  sync_warp();
  for (int i = 0; i < 8; i++) put(p, i, load_shared<uint32_t>(shared_memory() + (i * 32 + t) * 4));
}
PTX_KERNEL(probe_stored_matrices, 32, 1, 1024, stored_matrices, Params)

// A box is loaded from the middle, so that part of it lies beyond its matrix and is zero; it is dumped as it lies in shared
// memory, and stored where part of it lies beyond again.
PTX_D void boxes(const Params& p) {
  const int t = thread_id();
  const Shared box = shared_memory(), full = box + 8192;
  if (t == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  sync_block();
  if (t < 32 && elect_one()) {
    prefetch_tensor_map(&p.from);
    mbarrier_arrive_expect(full, 8192);
    tma_load(box, &p.from, full, 24, 32, 0);
  }
  mbarrier_wait(full, 0);
  for (int i = 0; i < 16; i++) put(p, 32 + i, load_shared<uint32_t>(box + (i * 128 + t) * 4));
  fence_proxy_async();
  sync_block();
  if (t < 32 && elect_one()) {
    tma_store(&p.to, box, 8, 16, 1);
    tma_store_commit();
    tma_store_wait_read<0>();
    tma_store_wait<0>();
  }
}
PTX_KERNEL(probe_boxes, 128, 1, 8192 + 8, boxes, Params)

// Boxes that lie beyond as a whole, nearby and far away, are zeros, whatever was there; their bytes are counted.
PTX_D void far_boxes(const Params& p) {
  constexpr int far = 1 << 30, at[5][3] = {{64, 0, 0}, {0, 64, 1}, {far, 0, 1}, {far + 64, 32, 0}, {0, far, 1}};
  const int t = thread_id();
  const Shared boxes = shared_memory(), full = boxes + 5 * 8192;
  for (int i = 0; i < 5 * 16; i++) store_shared(boxes + (i * 128 + t) * 4, ~0u);
  fence_proxy_async();
  if (t == 0) {
    mbarrier_init(full, 2);
    fence_mbarrier_init();
  }
  sync_block();
  if (t < 32 && elect_one()) {
    for (int i = 0; i < 5; i++) {
      mbarrier_expect(full, 8192);
      tma_load(boxes + i * 8192, &p.from, full, at[i][0], at[i][1], at[i][2]);
    }
    mbarrier_arrive(full);
  }
  if (t == 33) mbarrier_arrive(full);
  mbarrier_wait(full, 0);
  for (int i = 0; i < 5; i++) {
    uint32_t all = 0;
    for (int j = 0; j < 16; j++) all |= load_shared<uint32_t>(boxes + i * 8192 + (j * 128 + t) * 4);
    put(p, i, all);
  }
}
PTX_KERNEL(probe_far_boxes, 128, 1, 5 * 8192 + 8, far_boxes, Params)

// 64x64 by 64 deep: the numbers lie swizzled in shared memory, and the descriptors say along what.
template <class T, bool TRANSPOSED> PTX_D void warpgroup(const Params& p) {
  const int t = thread_id();
  const Shared a = shared_memory(), b = a + 8192;
  for (int i = t; i < 2048; i += 128) {
    const int row = i / 32, byte = i % 32 * 4;
    const uint32_t at = row * 128 + (byte ^ (row & 7) << 4);
    store_shared(a + at, pack<T>(whole(word(p, i)), whole(word(p, i) >> 8)));
    store_shared(b + at, pack<T>(whole(word(p, i + 2048)), whole(word(p, i + 2048) >> 8)));
  }
  fence_proxy_async();
  sync_block();
  float sum[32];
  wgmma_fence();
  for (int k = 0; k < 4; k++) {
    const uint32_t step = TRANSPOSED ? k * 2048 : k * 32;
    if constexpr (TRANSPOSED) wgmma<T, true, true>(sum, descriptor_transposed(a + step, 8192), descriptor_transposed(b + step, 8192), k > 0);
    else wgmma<T, false, false>(sum, descriptor(a + step), descriptor(b + step), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 32; i++) put(p, i, sum[i]);
}
PTX_D void warpgroup_bf16(const Params& p) { warpgroup<bf16, false>(p); }
PTX_D void warpgroup_f16(const Params& p) { warpgroup<f16, false>(p); }
PTX_D void warpgroup_transposed(const Params& p) { warpgroup<bf16, true>(p); }
PTX_KERNEL(probe_warpgroup_bf16, 128, 1, 16384, warpgroup_bf16, Params)
PTX_KERNEL(probe_warpgroup_f16, 128, 1, 16384, warpgroup_f16, Params)
PTX_KERNEL(probe_warpgroup_transposed, 128, 1, 16384, warpgroup_transposed, Params)

// cp.async told to an mbarrier; try_wait; one lane elected.
PTX_D void arrivals(const Params& p) {
  const int t = thread_id();
  const Shared full = shared_memory() + 512;
  if (t == 0) {
    mbarrier_init(full, 32);
    fence_mbarrier_init();
  }
  sync_block();
  if (t < 32) {
    cp_async<16>(shared_memory() + t * 16, (p.in + t * 4).as<const void>(), true);
    cp_async_mbarrier_arrive(full);
  } else {
    while (!mbarrier_try_wait(full, 0)) {}
    for (int i = 0; i < 4; i++) put(p, i, load_shared<uint32_t>(shared_memory() + (t % 32 * 4 + i) * 4));
  }
  put(p, 4, static_cast<uint32_t>(popcount(ptx::ballot(elect_one()))));
}
PTX_KERNEL(probe_arrivals, 64, 1, 520, arrivals, Params)

// Each of two blocks loads a box for both, whose bytes come before they are expected. Then each thread arrives at a barrier of
// either block, in one way or the other. Results below 20 are the first block's.
PTX_D void pairs(const Params& p) {
  const int t = thread_id(), rank = cluster_rank(), first = rank * 20;
  const Shared boxes = shared_memory(), full = boxes + 2 * 8192, met = full + 8;
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(met, 256);
    fence_mbarrier_init();
  }
  sync_cluster();
  if (t < 32 && elect_one()) tma_load_pair(boxes + rank * 8192, &p.from, full, rank * 16, rank * 24, rank);
  sync_cluster();
  if (t == 0) {
    mbarrier_expect(full, 8192);
    mbarrier_arrive_expect(full, 8192);
  }
  mbarrier_wait(full, 0);
  for (int i = 0; i < 16; i++) {
    const Shared at = boxes + (i * 128 + t) * 4;
    put(p, first + i, load_shared<uint32_t>(at) + 3 * load_shared<uint32_t>(at + 8192));
  }
  for (int to = 0; to < 2; to++)
    if (t % 2) mbarrier_arrive_at(met, to);
    else mbarrier_release_at(met, to);
  mbarrier_wait(met, 0);
  put(p, first + 16, static_cast<uint32_t>(rank));
  put(p, first + 17, static_cast<uint32_t>(block_id()));
  put(p, first + 18, static_cast<uint32_t>(block_count()));
  put(p, first + 19, static_cast<uint32_t>(mbarrier_try_wait(met, 0)));
  sync_cluster();
}
PTX_CLUSTER_KERNEL(probe_pairs, 128, 1, 2 * 8192 + 16, pairs, Params)
#endif

}  // namespace probes
