// Work that goes on while threads run: copies by cp.async, and what waits in the block's queue to happen.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "emulator/failure.h"

namespace emulator {

struct Block;
struct Cluster;
struct Fiber;

// One cp.async. A null source stands for zeros.
struct Copy {
  uint8_t* to;
  const void* from;
  int bytes, group;
  uint32_t stamp;
  bool landed = false, handed_over = false;  // handed over: an mbarrier is told when it has landed
  void land(Block& block);
};

// Those of one thread that it has not waited for, oldest first.
struct CopyQueue {
  std::vector<Copy> copies;
  size_t first = 0;
  int group = 0;  // the one that the next commit closes
  bool empty() const { return first == copies.size(); }
  void drop_waited();
  void land_until(Block& block, uint32_t stamp);
};

void start_copy(uint32_t to, const void* from, int bytes, bool predicate, const Where& where);
void wait_copies(int newest_left);

// Anything else asynchronous: run() does the work and signals its end.
struct Pending {
  std::function<void()> run;
  const Block* block;              // whose shared memory it works on
  const Fiber* storer = nullptr;  // of a store by TMA, with its group
  int group = 0;
  Where where;
};
void enqueue(Pending work);
void run_pending(Cluster& cluster, size_t i);
bool happens_at_once(Cluster& cluster);

}  // namespace emulator
