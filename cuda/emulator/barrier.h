// Barriers of threads: the sixteen of a block (sync_block, bar_sync, bar_arrive), and that of a cluster (sync_cluster).
#pragma once
#include "emulator/races.h"

namespace emulator {

struct Barrier {
  int wanted = 0, arrived = 0;
  uint32_t waiting[max_warps] = {};  // lanes of each warp of the cluster
  Knowledge known;                   // of those who arrived
};

struct Cluster;
// Arrives at the block's barrier of that number for `threads` threads, and waits for the others if `wait`.
void arrive_named(int id, int threads, bool wait, const Where& where);
// Waits for all threads of the cluster.
void arrive_cluster(const Where& where);
void complete(Cluster& cluster, Barrier& barrier);

}  // namespace emulator
