// Asynchronous copies from global to shared memory, in groups per thread.
#pragma once
#include "ptx/device/types.cuh"

namespace ptx {

// Copies BYTES (4, 8 or 16), or writes zeros where the predicate is false; then nothing is read. Those of 16 bytes have the
// L2 cache fetch FETCHED (128 or 256): a slice of an operand along K takes half of that, and the next one the rest.
template <int BYTES, int FETCHED = 128> PTX_D void cp_async(Shared to, Global<const void> from, bool predicate) {
  const int bytes = predicate ? BYTES : 0;
  if constexpr (BYTES == 16 && FETCHED == 256)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to.at), "l"(__cvta_generic_to_global(from.at)), "r"(bytes) : "memory");
  else if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to.at), "l"(__cvta_generic_to_global(from.at)), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.at), "l"(__cvta_generic_to_global(from.at)), "n"(BYTES), "r"(bytes) : "memory");
}
PTX_D void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's newest groups are in flight.
template <int N> PTX_D void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

}  // namespace ptx
