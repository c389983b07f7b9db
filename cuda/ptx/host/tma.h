// device/tma.cuh on the CPU.
#pragma once
#include "emulator/tma.h"
#include "ptx/host/mbarrier.h"

namespace ptx {

using TensorMap = emulator::TensorMap;

inline void prefetch_tensor_map(const TensorMap*) {}
inline void tma_load(Shared to, const TensorMap* map, Shared barrier, int x, int y, int z, Where where = Where::current()) {
  emulator::tensor_load(to.at, map, barrier.at, {x, y, z}, where);
}
inline void tma_load_pair(Shared to, const TensorMap* map, Shared barrier, int x, int y, int z, Where where = Where::current()) {
  emulator::tensor_load_pair(to.at, map, barrier.at, {x, y, z}, where);
}
inline void tma_store(const TensorMap* map, Shared from, int x, int y, int z, Where where = Where::current()) {
  emulator::tensor_store(map, from.at, {x, y, z}, where);
}
inline void tma_store_commit() { emulator::commit_stores(); }
template <int N> void tma_store_wait_read() { emulator::wait_stores(N); }
template <int N> void tma_store_wait() { emulator::wait_stores(N); }

}  // namespace ptx
