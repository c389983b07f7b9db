// device/mbarrier.cuh on the CPU.
#pragma once
#include "emulator/mbarrier.h"
#include "ptx/host/warp.h"

namespace ptx {

inline void mbarrier_init(Shared barrier, uint32_t arrivals, Where where = Where::current()) {
  emulator::init_mbarrier(barrier.at, arrivals, where);
}
inline void mbarrier_arrive(Shared barrier, Where where = Where::current()) { emulator::arrive_mbarrier(barrier.at, 0, where); }
inline void mbarrier_arrive_expect(Shared barrier, uint32_t bytes, Where where = Where::current()) {
  emulator::arrive_mbarrier(barrier.at, bytes, where);
}
inline void mbarrier_expect(Shared barrier, uint32_t bytes, Where where = Where::current()) {
  emulator::expect_bytes(barrier.at, bytes, where);
}
inline void cp_async_mbarrier_arrive(Shared barrier, Where where = Where::current()) { emulator::arrive_after_copies(barrier.at, where); }
inline bool mbarrier_try_wait(Shared barrier, uint32_t parity, Where where = Where::current()) {
  return emulator::try_wait_mbarrier(barrier.at, parity, where);
}
inline void mbarrier_wait(Shared barrier, uint32_t parity, Where where = Where::current()) {
  emulator::wait_mbarrier(barrier.at, parity, where);
}

inline void fence_mbarrier_init() { emulator::fence_mbarriers(); }
inline void fence_proxy_async() { emulator::fence_proxy(); }

inline bool elect_one(Where where = Where::current()) {
  bool elected;
  emulator::together("elect_one", elected, where, [](bool** lanes) {
    for (uint64_t lane = 0; lane < 32; lane++) *lanes[lane] = lane == emulator::settings.seed % 32;
  });
  return elected;
}
template <int REGISTERS> void setmaxnreg_inc(Where where = Where::current()) {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  int nothing = 0;
  emulator::together("setmaxnreg_inc", nothing, where, [](int**) {});
}
template <int REGISTERS> void setmaxnreg_dec(Where where = Where::current()) {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  int nothing = 0;
  emulator::together("setmaxnreg_dec", nothing, where, [](int**) {});
}

// Kernels run one after the other here.
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

}  // namespace ptx
