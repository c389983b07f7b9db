// What one block of threads has to itself: its shared memory, and the barriers in and beside it.
#pragma once
#include <cstdint>
#include <map>

#include "emulator/barrier.h"
#include "emulator/mbarrier.h"
#include "emulator/races.h"
#include "emulator/wgmma.h"

namespace emulator {

struct Cluster;

struct Block {
  Cluster& cluster;
  const int rank, threads;                 // rank: which block of its cluster
  const uint32_t shared_bytes;
  int id = 0, count = 0, live = 0;         // count: blocks of the grid; live: threads that have not returned
  uint8_t* shared;
  Shadow shadow;
  Barrier named[16];
  std::map<uint32_t, MBarrier> mbarriers;  // by offset
  uint64_t shared_version = 0;             // changes with what shared memory holds
  Panel panels[8];
  unsigned next_panel = 0;
  struct Reach { uint32_t stamp = 0; Where where; } reached[max_agents];  // the last by each agent of another block

  Block(Cluster& cluster, int rank, int threads, uint32_t shared_bytes);
  ~Block();
  Block(const Block&) = delete;
  void start(int id);
  void end();  // its last thread, the current one, has returned
};

// The current thread, or its asynchronous work, does something in the memory of a block that may be another one.
void reach(Block& block, int agent, uint32_t stamp, const char* what, const Where& where);

}  // namespace emulator
