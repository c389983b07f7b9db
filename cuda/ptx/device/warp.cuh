// Who a thread is, and what the 32 lanes of a warp and the threads of a block do together. All lanes take part.
#pragma once
#include "ptx/device/types.cuh"

namespace ptx {

PTX_D int thread_id() { return threadIdx.x; }
PTX_D int block_threads() { return blockDim.x; }
PTX_D int block_id() { return blockIdx.x; }
PTX_D int block_count() { return gridDim.x; }

template <class T> PTX_D T shfl(T value, int lane) { return __shfl_sync(~0u, value, lane); }
template <class T> PTX_D T shfl_xor(T value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
// The value of `lane - delta`; the lowest `delta` lanes keep their own.
template <class T> PTX_D T shfl_up(T value, int delta) { return __shfl_up_sync(~0u, value, delta); }
PTX_D uint32_t ballot(bool predicate) { return __ballot_sync(~0u, predicate); }
// The lanes that hold the same value.
PTX_D uint32_t match_any(uint32_t value) { return __match_any_sync(~0u, value); }
PTX_D uint32_t redux_max(uint32_t value) { return __reduce_max_sync(~0u, value); }
PTX_D uint32_t redux_min(uint32_t value) { return __reduce_min_sync(~0u, value); }
PTX_D int redux_add(int value) { return __reduce_add_sync(~0u, value); }
PTX_D void sync_warp() { __syncwarp(); }

PTX_D void sync_block() { __syncthreads(); }
// Named barrier 1 to 15 of `threads` threads, a multiple of 32; 0 is sync_block's.
PTX_D void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
PTX_D void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace ptx
