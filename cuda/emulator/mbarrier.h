// Barriers in shared memory that count arrivals and bytes.
#pragma once
#include <cstdint>

#include "emulator/races.h"

namespace emulator {

struct Block;
struct Warp;

struct MBarrier {
  uint32_t count, missing;             // arrivals that a phase takes; that the current one still lacks
  int64_t bytes = 0;                   // expected and not yet copied
  uint32_t phase = 0;
  int initialiser = 0;                 // thread
  bool fenced = false;                 // the initialisation has been made visible to the asynchronous proxy
  uint32_t waiting[max_warps] = {};    // lanes of each warp
  Knowledge arriving = {}, completed = {};      // of those who arrive at the current phase; who arrived at the last
};

void init_mbarrier(uint32_t address, uint32_t count, const Where& where);
// Of the current thread: `bytes` more are expected, then one arrival.
void arrive_mbarrier(uint32_t address, uint32_t bytes, const Where& where);
// The arrival happens when the thread's earlier cp.async have landed.
void arrive_after_copies(uint32_t address, const Where& where);
bool try_wait_mbarrier(uint32_t address, uint32_t parity, const Where& where);
void wait_mbarrier(uint32_t address, uint32_t parity, const Where& where);
void fence_mbarriers();
// Later asynchronous reads may see what this thread has written or knows to be written.
void fence_proxy();

// The barrier at an address, for asynchronous work that is to signal it.
MBarrier& mbarrier_at(Block& block, uint32_t address, const Where& where);
void complete_bytes(Block& block, MBarrier& barrier, int64_t bytes, const Knowledge& known);

}  // namespace emulator
