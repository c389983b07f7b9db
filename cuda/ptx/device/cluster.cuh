// Two blocks that run together and reach each other's barriers (sm_90): the pair of a PTX_CLUSTER_KERNEL.
//
// A block must not return while the other one may still reach it, nor reach for the other one before that has begun:
// sync_cluster() is the first and the last thing that they do.
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
// Arrives at the barrier at this place in the shared memory of the block of that rank; it may be the own one. All that
// this thread has written is visible to whoever waits in that block: the memory system is waited for, in each call.
PTX_D void mbarrier_arrive_at(Shared barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier.at), "r"(rank) : "memory");
}
// The same for a thread that has only read, such as one that gives memory back to be overwritten: nothing is waited for.
PTX_D void mbarrier_release_at(Shared barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier.at), "r"(rank) : "memory");
}

}  // namespace ptx
#endif
