#include "emulator/cluster.h"

#include <algorithm>

#include "emulator/launch.h"
#include "emulator/scheduler.h"

namespace emulator {

static void run_threads() {
  entered();
  for (;;) {
    current->cluster->kernel->body(current->cluster->params);
    finish();
  }
}

Cluster::Cluster(int block_count, int threads, uint32_t shared_bytes)
    : warp_count(block_count * threads / 32), agents((2 * warp_count + 7) & ~7), fibers(block_count * threads), warps(warp_count),
      stacks(block_count * threads) {
  for (int rank = 0; rank < block_count; rank++) blocks.push_back(std::make_unique<Block>(*this, rank, threads, shared_bytes));
  for (int w = 0; w < warp_count; w++) {
    warps[w].id = w;
    warps[w].number = w % (threads / 32);
    warps[w].block = blocks[w / (threads / 32)].get();
    warps[w].cluster = this;
  }
  for (size_t i = 0; i < fibers.size(); i++) {
    Fiber& f = fibers[i];
    f.warp = &warps[i / 32];
    f.id = f.warp->number * 32 + static_cast<int>(i % 32);
    f.lane = static_cast<int>(i % 32);
    f.block = f.warp->block;
    f.cluster = this;
    prepare(f.context, stacks[static_cast<int>(i)], Stacks::bytes, run_threads);
  }
}

void Cluster::start(int first_block, int block_count) {
  random_state = (settings.seed + 1) * 0x9e3779b97f4a7c15u ^ (static_cast<uint64_t>(first_block) * 0xd1b54a32d192ed03u + 77);
  for (int i = 0; i < 4; i++) random();
  for (const auto& block : blocks) {
    block->start(first_block + block->rank);
    block->count = block_count;
  }
  all = {};
  pending.clear();
  // Stamps go on from cluster to cluster, so that the records of the last one count as long known.
  for (const Warp& w : warps) highest_stamp = std::max({highest_stamp, w.known.seen.of[w.id], w.issued});
  live = static_cast<int>(fibers.size());
  for (Warp& w : warps) {
    for (int agent = 0; agent < agents; agent++) w.known.seen.of[agent] = w.known.fenced.of[agent] = highest_stamp;
    release(w);
    w.issued = highest_stamp;
    w.ready = w.live = ~0u;
    w.arrived = 0;
    w.epoch++;
    w.products = {};
  }
  ready_warps = warp_count == 32 ? ~0u : (1u << warp_count) - 1;
  for (Fiber& f : fibers) {
    f.done = false;
    f.copies = {};
    f.stores = {};
    f.products = {};
    f.polled = nullptr;
  }
}

void Cluster::run(int first_block, int block_count) {
  start(first_block, block_count);
  prepare_own(host);
  current = &fibers[settings.shuffle ? random() % fibers.size() : 0];
  switch_to(host, current->context);
  current = nullptr;
  if (!error.empty()) throw Failure(error);
  check_warpgroups(*this);
}

std::string Cluster::agent_name(int agent) const {
  const Warp& warp = warps[agent % warp_count];
  return (agent >= warp_count ? "the asynchronous work of warp " : "warp ") + std::to_string(warp.number) +
         (blocks.size() > 1 ? " of block " + std::to_string(warp.block->id) : "");
}

}  // namespace emulator
