// Which thread of the cluster runs next.
#pragma once
#include "emulator/cluster.h"

namespace emulator {

// The current thread stops until wake(); `what` and `object` are for the report of a deadlock.
void suspend(const char* what, uint32_t object, const Where& where);
void wake(Warp& warp, uint32_t lanes);
// Another thread may run first.
void yield();
// Perhaps another thread runs first, where the order is shuffled.
inline void preempt() {
  if (settings.shuffle && current->cluster->random() % 32 == 0) yield();
}
// The current thread has returned from the kernel. Comes back when the cluster starts anew.
void finish();

// What others know of this warp from now on does not cover what it does next.
inline void release(Warp& warp) { warp.known.seen.of[warp.id]++; }

}  // namespace emulator
