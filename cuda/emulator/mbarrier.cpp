#include "emulator/mbarrier.h"

#include <cstring>

#include "emulator/scheduler.h"
#include "emulator/shared.h"

namespace emulator {
namespace {

// What the eight bytes of a barrier hold, so that data written over it is noticed.
uint64_t mark(uint32_t offset) { return 0xba88ba885eed5eedu ^ offset; }

void complete_phase(Cluster& cluster, MBarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  barrier.phase++;
  barrier.missing = barrier.count;
  barrier.completed = barrier.arriving;
  for (Warp& warp : cluster.warps) {
    wake(warp, barrier.waiting[warp.id]);
    barrier.waiting[warp.id] = 0;
  }
}

void arrive(Cluster& cluster, MBarrier& barrier, const Knowledge& known, const Where& where) {
  if (!barrier.missing) fail(where, "more arrivals at an mbarrier than the %u of a phase", barrier.count);
  barrier.missing--;
  barrier.arriving.join(known, cluster.agents);
  complete_phase(cluster, barrier);
}

// A phase cannot count more bytes, whether they are expected or have come before they were.
void expect(MBarrier& barrier, int64_t bytes, const Where& where) {
  barrier.bytes += bytes;
  if (std::abs(barrier.bytes) >= 1 << 20)
    fail(where, "an mbarrier counts %lld bytes, more than 2^20 - 1", static_cast<long long>(barrier.bytes));
}

bool ended(const MBarrier& barrier, uint32_t parity) { return (barrier.phase & 1) != (parity & 1); }

void learn(const MBarrier& barrier) {
  current->warp->known.join(barrier.completed, current->cluster->agents);
  current->warp->epoch++;
}

}  // namespace

MBarrier& mbarrier_at(Block& block, uint32_t address, const Where& where) {
  const uint8_t* at = shared_at(block, address, 8, 8, "mbarrier", where);
  const uint32_t offset = shared_offset(address);
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) fail(where, "the mbarrier at shared byte %u is not initialised", offset);
  const uint64_t wanted = mark(offset);
  if (memcmp(at, &wanted, sizeof wanted)) fail(where, "the mbarrier at shared byte %u was overwritten", offset);
  // Later than its initialisation, as far as the current warp knows.
  if (settings.races) block.shadow.read(offset, 8, own_access(true), current->warp->known, where);
  return found->second;
}

void init_mbarrier(uint32_t address, uint32_t count, const Where& where) {
  if (!count || count >= 1u << 20) fail(where, "mbarrier_init for %u arrivals", count);
  const uint64_t value = mark(shared_offset(address));
  memcpy(write_shared(address, 8, false, "mbarrier_init", where), &value, sizeof value);
  MBarrier barrier{.count = count, .missing = count, .initialiser = current, .where = where};
  current->block->mbarriers[shared_offset(address)] = barrier;
}

void arrive_mbarrier(uint32_t address, uint32_t bytes, const Where& where) {
  preempt();
  Block& block = *current->block;
  Warp& warp = *current->warp;
  MBarrier& barrier = mbarrier_at(block, address, where);
  expect(barrier, bytes, where);
  arrive(block.cluster, barrier, warp.known, where);
  release(warp);
  preempt();
}

void arrive_mbarrier_at(uint32_t address, int rank, const Where& where) {
  preempt();
  Cluster& cluster = *current->cluster;
  Warp& warp = *current->warp;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) fail(where, "mbarrier_arrive_at: no block of rank %d in the cluster", rank);
  Block& block = *cluster.blocks[rank];
  reach(block, warp.id, warp.known.seen.of[warp.id], "mbarrier_arrive_at", where);
  arrive(cluster, mbarrier_at(block, same_place(address, block, 8, 8, "mbarrier_arrive_at", where), where), warp.known, where);
  release(warp);
  preempt();
}

void expect_bytes(uint32_t address, uint32_t bytes, const Where& where) {
  preempt();
  Block& block = *current->block;
  MBarrier& barrier = mbarrier_at(block, address, where);
  expect(barrier, bytes, where);
  complete_phase(block.cluster, barrier);
  preempt();
}

void arrive_after_copies(uint32_t address, const Where& where) {
  preempt();
  Block& block = *current->block;
  Warp& warp = *current->warp;
  MBarrier& barrier = mbarrier_at(block, address, where);
  Knowledge known = warp.known;
  release(warp);
  uint32_t& seen = known.seen.of[block.cluster.async_agent(warp)];
  for (Copy& copy : current->copies.copies) {
    copy.handed_over = true;
    seen = std::max(seen, copy.stamp);
  }
  enqueue({.run = [&block, &barrier, thread = current, known, stamp = seen, where] {
             thread->copies.land_until(block, stamp);
             arrive(block.cluster, barrier, known, where);
           },
           .block = &block, .where = where});
}

bool try_wait_mbarrier(uint32_t address, uint32_t parity, const Where& where) {
  preempt();
  Cluster& cluster = *current->cluster;
  const MBarrier& barrier = mbarrier_at(*current->block, address, where);
  if (!ended(barrier, parity)) {
    // Who polls never stops, so asynchronous work has to happen while threads can run.
    if (++cluster.polls % 64 == 0 && !cluster.pending.empty()) run_pending(cluster, 0);
    yield();
    return false;
  }
  learn(barrier);
  return true;
}

void wait_mbarrier(uint32_t address, uint32_t parity, const Where& where) {
  preempt();
  MBarrier& barrier = mbarrier_at(*current->block, address, where);
  while (!ended(barrier, parity)) {
    barrier.waiting[current->warp->id] |= 1u << current->lane;
    suspend(parity ? "mbarrier_wait (parity 1), shared byte" : "mbarrier_wait (parity 0), shared byte", shared_offset(address), where);
  }
  learn(barrier);
}

void fence_mbarriers() {
  for (auto& [offset, barrier] : current->block->mbarriers)
    if (barrier.initialiser == current) barrier.fenced = true;
}

void fence_proxy() {
  Warp& warp = *current->warp;
  warp.known.fenced.join(warp.known.seen, current->cluster->agents);
  release(warp);  // not what it writes from now on
}

void complete_bytes(Block& block, MBarrier& barrier, int64_t bytes, const Knowledge& known, const Where& where) {
  expect(barrier, -bytes, where);
  barrier.arriving.join(known, block.cluster.agents);
  complete_phase(block.cluster, barrier);
}

}  // namespace emulator
