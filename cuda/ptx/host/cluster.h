// device/cluster.cuh on the CPU.
#pragma once
#include "emulator/mbarrier.h"
#include "ptx/host/warp.h"

namespace ptx {

inline int cluster_rank() { return emulator::current->block->rank; }
inline void sync_cluster(Where where = Where::current()) {
  int nothing = 0;
  emulator::together("sync_cluster", nothing, where, [](int**) {});
  emulator::arrive_cluster(where);
}
inline void mbarrier_arrive_at(Shared barrier, int rank, Where where = Where::current()) {
  emulator::arrive_mbarrier_at(barrier.at, rank, where);
}
// No block reads what threads of another one have written, so both arrivals tell the same.
inline void mbarrier_release_at(Shared barrier, int rank, Where where = Where::current()) {
  emulator::arrive_mbarrier_at(barrier.at, rank, where);
}

}  // namespace ptx
