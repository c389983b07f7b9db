// Two blocks that run together and reach each other's barriers (sm_90): a cluster of a PTX_CLUSTER_KERNEL.
//
// A block must not reach for the other one before that has begun and has initialised its barriers, nor return while the
// other one may still reach it: sync_cluster() is the first thing that they do after that, and the last of all.
//
// No thread reads what one of the other block has written: arrivals from there say that memory has been read, and bytes
// that are multicast are visible to whoever sees them counted. So mbarrier_wait is told of both without a wider scope.
#pragma once
#include "ptx/device/types.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace ptx {

// 0 or 1: which block of its cluster this is; block_id() is 2 * (number of the cluster) + cluster_rank().
PTX_D int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// All threads of both blocks.
PTX_D void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier at this place in the shared memory of the block of that rank; it may be the own one. The arrival
// comes after all that this thread has written, in the eyes of both blocks: each call waits for the memory system.
PTX_D void mbarrier_arrive_at(Shared barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier.at), "r"(rank) : "memory");
}
// The same where this thread has only read, and gives memory back to be overwritten: it waits for nothing.
PTX_D void mbarrier_release_at(Shared barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier.at), "r"(rank) : "memory");
}

}  // namespace ptx
#endif
