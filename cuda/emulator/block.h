// What one block of threads is: its fibers, warps, shared memory and barriers.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "emulator/barrier.h"
#include "emulator/fiber.h"
#include "emulator/mbarrier.h"
#include "emulator/races.h"
#include "emulator/settings.h"
#include "emulator/tma.h"
#include "emulator/wgmma.h"

namespace emulator {

struct Block;
struct Kernel;
struct Warp;

struct Fiber {
  Context context;
  int id = 0, lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
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
  int id = 0;
  Block* block = nullptr;
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

struct Block {
  const Kernel* kernel = nullptr;
  const void* params = nullptr;
  int id = 0, count = 0, threads = 0, warp_count = 0, agents = 0, live = 0;
  uint32_t shared_bytes = 0;
  uint8_t* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;
  std::unique_ptr<Stacks> stacks;
  Context host;                           // where launch() waits for the block to end
  std::string error;
  Shadow shadow;
  uint32_t highest_stamp = 0;
  NamedBarrier named[16];
  std::map<uint32_t, MBarrier> mbarriers;  // by offset
  std::vector<Pending> pending;
  uint64_t polls = 0;                     // of mbarriers whose phase had not ended
  uint64_t shared_version = 0;            // changes with what shared memory holds
  Panel panels[8];
  unsigned next_panel = 0;
  uint64_t random_state = 1;

  Block(int threads, uint32_t shared_bytes);
  ~Block();
  void run(int id);  // all threads, to their end; throws Failure

  uint32_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<uint32_t>(random_state >> 16);
  }
  int async_agent(const Warp& w) const { return warp_count + w.id; }

 private:
  void start(int id);
};

inline thread_local Fiber* current = nullptr;

// An access by the current thread itself.
inline Access own_access(bool atomic = false) {
  const Warp& w = *current->warp;
  return {w.id, w.known.seen.of[w.id], w.id, static_cast<uint8_t>(current->lane), w.epoch, atomic};
}

}  // namespace emulator
