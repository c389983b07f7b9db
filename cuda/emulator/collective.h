// What all 32 lanes of a warp do together: each leaves its argument, and the last to come does the work.
#pragma once
#include "emulator/scheduler.h"

namespace emulator {

// `work(arguments)` gets the lanes' arguments in order; `what` is a literal, the same for the same operation.
template <class Argument, class Work> void together(const char* what, Argument& argument, const Where& where, Work&& work) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  if (warp.live != ~0u) fail(where, "%s in a warp where some lanes have returned from the kernel", what);
  if (!warp.arrived) {
    warp.collective = what;
    warp.where = where;
  } else if (warp.collective != what || warp.where.line() != where.line()) {
    fail(where, "lanes of the warp differ: this one is in %s, others are in %s at %s", what, warp.collective,
         short_place(warp.where).c_str());
  }
  warp.arguments[self.lane] = &argument;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != ~0u) return suspend(what, 0, where);
  warp.arrived = 0;
  Argument* arguments[32];
  for (int lane = 0; lane < 32; lane++) arguments[lane] = static_cast<Argument*>(warp.arguments[lane]);
  work(arguments);
  wake(warp, ~0u);
  preempt();
}

}  // namespace emulator
