#include "emulator/barrier.h"

#include "emulator/scheduler.h"

namespace emulator {

void complete(Block& block, NamedBarrier& barrier) {
  for (int w = 0; w < block.warp_count; w++)
    if (barrier.waiting[w]) {
      block.warps[w].known.join(barrier.known, block.agents);
      block.warps[w].epoch++;
      wake(block.warps[w], barrier.waiting[w]);
    }
  barrier = {};
}

void arrive_named(int id, int threads, bool wait, const Where& where) {
  Warp& warp = *current->warp;
  Block& block = *current->block;
  if (id < 0 || id > 15) fail(where, "barrier %d does not exist", id);
  NamedBarrier& barrier = block.named[id];
  if (id && (threads % 32 || threads <= 0 || threads > block.threads))
    fail(where, "barrier %d: %d threads; must be a multiple of 32 up to %d", id, threads, block.threads);
  if (id && barrier.arrived && barrier.wanted != threads)
    fail(where, "barrier %d: others arrived at it for %d threads, this one for %d", id, barrier.wanted, threads);
  barrier.wanted = threads;
  barrier.arrived++;
  barrier.known.join(warp.known, block.agents);
  release(warp);
  if (wait) barrier.waiting[warp.id] |= 1u << current->lane;
  if (barrier.arrived == threads) {
    complete(block, barrier);
    preempt();
  } else if (wait) {
    suspend("barrier", static_cast<uint32_t>(id), where);
  } else {
    preempt();
  }
}

}  // namespace emulator
