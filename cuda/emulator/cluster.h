// The blocks that run together: their threads, and all that goes on between those. Most kernels have one block a cluster.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/block.h"
#include "emulator/fiber.h"
#include "emulator/settings.h"
#include "emulator/tma.h"

namespace emulator {

struct Kernel;
struct Warp;

struct Fiber {
  Context context;
  int id = 0, lane = 0;                   // id: thread of the block
  Warp* warp = nullptr;
  Block* block = nullptr;
  Cluster* cluster = nullptr;
  bool done = false;
  const char* waits_in = "";  // for the report of a deadlock
  uint32_t waits_for = 0;
  Where where;
  CopyQueue copies;
  StoreGroups stores;
  ProductIssue products;
  const void* polled = nullptr;  // the last global address loaded
};

struct Warp {
  int id = 0, number = 0;                 // in the cluster, in the block
  Block* block = nullptr;
  Cluster* cluster = nullptr;
  uint32_t ready = 0, live = 0;           // lanes that can run; that have not returned
  const char* collective = nullptr;       // what the lanes in `arrived` wait in
  Where where;
  uint32_t arrived = 0;
  void* arguments[32];
  Knowledge known;
  uint32_t issued = 0;                    // clock of the asynchronous agent
  uint32_t epoch = 0;                     // how often the lanes have synchronised
  ProductQueue products;
};

struct Cluster {
  const Kernel* kernel = nullptr;
  const void* params = nullptr;
  const int warp_count, agents;
  int live = 0;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;
  Stacks stacks;
  Context host;                           // where launch() waits for the cluster to end
  std::string error;
  uint32_t highest_stamp = 0;
  Barrier all;                            // sync_cluster
  std::vector<Pending> pending;
  uint64_t polls = 0;                     // of mbarriers whose phase had not ended
  uint64_t random_state = 1;

  Cluster(int block_count, int threads, uint32_t shared_bytes);
  void run(int first_block, int block_count);  // all threads, to their end, in a grid of so many; throws Failure

  uint32_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 16);
  }
  int async_agent(const Warp& w) const { return warp_count + w.id; }
  // "warp 3", "the asynchronous work of warp 3 of block 7".
  std::string agent_name(int agent) const;

 private:
  void start(int first_block, int block_count);
};

inline thread_local Fiber* current = nullptr;

// An access by the current thread itself.
inline Access own_access(bool atomic = false) {
  const Warp& w = *current->warp;
  return {w.id, w.known.seen.of[w.id], w.id, static_cast<uint8_t>(current->lane), w.epoch, atomic};
}

}  // namespace emulator
