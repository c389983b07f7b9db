// Barriers in shared memory that count arrivals and bytes.
#pragma once
#include <cstdint>

#include "emulator/races.h"

namespace emulator {

struct Block;
struct Fiber;

struct MBarrier {
  uint32_t count, missing;             // arrivals that a phase takes; that the current one still lacks
  int64_t bytes = 0;                   // expected and not yet copied; less than none where they come first
  uint32_t phase = 0;
  const Fiber* initialiser = nullptr;
  bool fenced = false;                 // the initialisation has been made visible to the asynchronous proxy
  uint32_t waiting[max_warps] = {};    // lanes of each warp
  Knowledge arriving = {}, completed = {};      // of those who arrive at the current phase; who arrived at the last
  Where where;                         // of its initialisation
};

void init_mbarrier(uint32_t address, uint32_t count, const Where& where);
// Of the current thread: `bytes` more are expected, then one arrival.
void arrive_mbarrier(uint32_t address, uint32_t bytes, const Where& where);
// One arrival at the barrier at this place in the block of that rank of the cluster.
void arrive_mbarrier_at(uint32_t address, int rank, const Where& where);
void expect_bytes(uint32_t address, uint32_t bytes, const Where& where);
// The arrival happens when the thread's earlier cp.async have landed.
void arrive_after_copies(uint32_t address, const Where& where);
bool try_wait_mbarrier(uint32_t address, uint32_t parity, const Where& where);
void wait_mbarrier(uint32_t address, uint32_t parity, const Where& where);
void fence_mbarriers();
// Later asynchronous reads may see what this thread has written or knows to be written.
void fence_proxy();

// The barrier at an address of that block's, for asynchronous work that is to signal it.
MBarrier& mbarrier_at(Block& block, uint32_t address, const Where& where);
void complete_bytes(Block& block, MBarrier& barrier, int64_t bytes, const Knowledge& known, const Where& where);

}  // namespace emulator
