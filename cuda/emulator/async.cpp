#include "emulator/async.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "emulator/memory.h"
#include "emulator/scheduler.h"
#include "emulator/shared.h"

namespace emulator {

bool happens_at_once(Block& block) {
  return settings.completion == Completion::early || (settings.completion == Completion::random && block.random() % 4 == 0);
}

void Copy::land() {
  if (landed) return;
  landed = true;
  current->block->shared_version++;
  if (from)
    memcpy(to, from, bytes);
  else
    memset(to, 0, bytes);
}

void CopyQueue::land_until(uint32_t stamp) {
  for (size_t i = first; i < copies.size() && copies[i].stamp <= stamp; i++) copies[i].land();
  while (!empty() && copies[first].landed && copies[first].handed_over) first++;
  drop_waited();
}

void CopyQueue::drop_waited() {
  if (!empty()) return;
  copies.clear();
  first = 0;
}

void start_copy(uint32_t to, const void* from, int bytes, bool predicate, const Where& where) {
  preempt();
  Block& block = *current->block;
  Warp& warp = *current->warp;
  uint8_t* target = shared_at(block, to, bytes, bytes, "cp_async", where);
  if (predicate) check_load(from, bytes, "cp_async", where);
  const uint32_t stamp = ++warp.issued;
  if (settings.races)
    block.shadow.write(shared_offset(to), bytes, {block.async_agent(warp), stamp, warp.id, static_cast<uint8_t>(current->lane), warp.epoch}, warp.known, where);
  CopyQueue& queue = current->copies;
  queue.copies.push_back({target, predicate ? from : nullptr, bytes, queue.group, stamp});
  if (happens_at_once(block)) queue.copies.back().land();
}

void wait_copies(int newest_left) {
  Block& block = *current->block;
  Warp& warp = *current->warp;
  CopyQueue& queue = current->copies;
  uint32_t& seen = warp.known.seen.of[block.async_agent(warp)];
  for (; !queue.empty() && queue.copies[queue.first].group < queue.group - newest_left; queue.first++) {
    Copy& copy = queue.copies[queue.first];
    copy.land();
    seen = std::max(seen, copy.stamp);
    if (settings.races)
      block.shadow.landed(static_cast<uint32_t>(copy.to - block.shared), copy.bytes, block.async_agent(warp), copy.stamp, own_access());
  }
  queue.drop_waited();
}

void enqueue(Block& block, Pending work) {
  block.pending.push_back(std::move(work));
  if (happens_at_once(block)) run_pending(block, block.pending.size() - 1);
}

void run_pending(Block& block, size_t i) {
  const Pending work = std::move(block.pending[i]);
  block.pending.erase(block.pending.begin() + static_cast<ptrdiff_t>(i));
  work.run();
}

}  // namespace emulator
