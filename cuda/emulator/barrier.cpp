#include "emulator/barrier.h"

#include "emulator/scheduler.h"

namespace emulator {

void complete(Cluster& cluster, Barrier& barrier) {
  for (Warp& warp : cluster.warps)
    if (barrier.waiting[warp.id]) {
      warp.known.join(barrier.known, cluster.agents);
      warp.epoch++;
      wake(warp, barrier.waiting[warp.id]);
    }
  barrier = {};
}

static void arrive(Barrier& barrier, int threads, bool wait, const char* what, int id, const Where& where) {
  Warp& warp = *current->warp;
  Cluster& cluster = *current->cluster;
  barrier.wanted = threads;
  barrier.arrived++;
  barrier.known.join(warp.known, cluster.agents);
  release(warp);
  if (wait) barrier.waiting[warp.id] |= 1u << current->lane;
  if (barrier.arrived == threads) {
    complete(cluster, barrier);
    preempt();
  } else if (wait) {
    suspend(what, static_cast<uint32_t>(id), where);
  } else {
    preempt();
  }
}

void arrive_named(int id, int threads, bool wait, const Where& where) {
  Block& block = *current->block;
  if (id < 0 || id > 15) fail(where, "barrier %d does not exist", id);
  Barrier& barrier = block.named[id];
  if (id && (threads % 32 || threads <= 0 || threads > block.threads))
    fail(where, "barrier %d: %d threads; must be a multiple of 32 up to %d", id, threads, block.threads);
  if (id && barrier.arrived && barrier.wanted != threads)
    fail(where, "barrier %d: others arrived at it for %d threads, this one for %d", id, barrier.wanted, threads);
  arrive(barrier, threads, wait, "barrier", id, where);
}

void arrive_cluster(const Where& where) { arrive(current->cluster->all, current->cluster->live, true, "sync_cluster", 0, where); }

}  // namespace emulator
