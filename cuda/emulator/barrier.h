// The sixteen barriers of a block: sync_block, bar_sync, bar_arrive.
#pragma once
#include "emulator/races.h"

namespace emulator {

struct NamedBarrier {
  int wanted = 0, arrived = 0;
  uint32_t waiting[max_warps] = {};  // lanes of each warp
  Knowledge known;                   // of those who arrived
};

struct Block;
// Arrives at a barrier of `threads` threads, and waits for the others if `wait`.
void arrive_named(int id, int threads, bool wait, const Where& where);
void complete(Block& block, NamedBarrier& barrier);

}  // namespace emulator
