// device/wgmma.cuh on the CPU.
#pragma once
#include "emulator/wgmma.h"
#include "ptx/host/warp.h"
#include "ptx/device/descriptor.cuh"

namespace ptx {

inline void wgmma_fence() { emulator::current->products.fenced = true; }
inline void wgmma_commit() {
  emulator::current->products.group++;
  emulator::current->products.fenced = false;
}
template <int N> void wgmma_wait(Where where = Where::current()) { emulator::wait_products(N, where); }

template <class T, bool TA, bool TB, int REGISTERS>
void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate, Where where = Where::current()) {
  static_assert(REGISTERS == 32 || REGISTERS == 64 || REGISTERS == 128);
  constexpr auto format = std::is_same_v<T, bf16> ? emulator::Format::bf16 : emulator::Format::f16;
  emulator::issue_product({.a = a, .b = b, .columns = 2 * REGISTERS, .format = format, .a_transposed = TA, .b_transposed = TB,
                           .accumulate = accumulate, .group = 0, .stamp = 0, .where = where}, d);
}

}  // namespace ptx
