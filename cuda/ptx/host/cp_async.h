// device/cp_async.cuh on the CPU.
#pragma once
#include "emulator/async.h"
#include "ptx/host/memory.h"

namespace ptx {

template <int BYTES, int FETCHED = 128> void cp_async(Shared to, Global<const void> from, bool predicate, Where where = Where::current()) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  static_assert(FETCHED == 128 || FETCHED == 256);
  emulator::start_copy(to.at, from.host_address(), BYTES, predicate, where);
}
inline void cp_async_commit() { emulator::current->copies.group++; }
template <int N> void cp_async_wait() { emulator::wait_copies(N); }

}  // namespace ptx
