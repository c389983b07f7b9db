// Copies of boxes between three-dimensional tensors and shared memory by the tensor memory accelerator (sm_90).
//
// A tensor is `depth` matrices of `height` rows of `width` elements, a box a part of one matrix: its first element is
// number x of row y of matrix z. One thread issues a copy.
//
// Coordinates are not negative, and x is a multiple of 16 bytes: only such have run well on a GPU. A store that begins at a
// negative coordinate is an error (CUDA Programming Guide, "Negative indices and out of bounds"; loads may, there), and so is
// any other x. What lies beyond the far ends of the tensor is read as zero and not written, however far away.
#pragma once
#include "ptx/device/types.cuh"

namespace ptx {
// CUtensorMap, whose own alignment is larger in some versions of cuda.h than the hardware asks for.
struct alignas(64) TensorMap { uint64_t opaque[16]; };
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace ptx {

PTX_D void prefetch_tensor_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// All bytes of the box are counted on `barrier`.
PTX_D void tma_load(Shared to, const TensorMap* map, Shared barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], [%2];"
               ::"r"(to.at), "l"(map), "r"(barrier.at), "r"(x), "r"(y), "r"(z) : "memory");
}
// The box goes to this place in both blocks of the cluster, and is counted on the barrier at this place in each.
PTX_D void tma_load_pair(Shared to, const TensorMap* map, Shared barrier, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
               " [%0], [%1, {%3,%4,%5}], [%2], %6;"
               ::"r"(to.at), "l"(map), "r"(barrier.at), "r"(x), "r"(y), "r"(z), "h"(uint16_t{3}) : "memory");
}
PTX_D void tma_store(const TensorMap* map, Shared from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2,%3,%4}], [%1];"
               ::"l"(map), "r"(from.at), "r"(x), "r"(y), "r"(z) : "memory");
}
PTX_D void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most N of this thread's newest store groups still read shared memory.
template <int N> PTX_D void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
template <int N> PTX_D void tma_store_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }

}  // namespace ptx
#endif
