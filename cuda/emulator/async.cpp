#include "emulator/async.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "emulator/memory.h"
#include "emulator/scheduler.h"
#include "emulator/shared.h"

namespace emulator {

bool happens_at_once(Cluster& cluster) {
  return settings.completion == Completion::early || (settings.completion == Completion::random && cluster.random() % 4 == 0);
}

void Copy::land(Block& block) {
  if (landed) return;
  landed = true;
  block.shared_version++;
  if (from)
    memcpy(to, from, bytes);
  else
    memset(to, 0, bytes);
}

void CopyQueue::land_until(Block& block, uint32_t stamp) {
  for (size_t i = first; i < copies.size() && copies[i].stamp <= stamp; i++) copies[i].land(block);
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
    block.shadow.write(shared_offset(to), bytes, {block.cluster.async_agent(warp), stamp, warp.id, static_cast<uint8_t>(current->lane), warp.epoch}, warp.known, where);
  CopyQueue& queue = current->copies;
  queue.copies.push_back({target, predicate ? from : nullptr, bytes, queue.group, stamp});
  if (happens_at_once(block.cluster)) queue.copies.back().land(block);
}

void wait_copies(int newest_left) {
  Block& block = *current->block;
  Warp& warp = *current->warp;
  CopyQueue& queue = current->copies;
  const int agent = block.cluster.async_agent(warp);
  uint32_t& seen = warp.known.seen.of[agent];
  for (; !queue.empty() && queue.copies[queue.first].group < queue.group - newest_left; queue.first++) {
    Copy& copy = queue.copies[queue.first];
    copy.land(block);
    seen = std::max(seen, copy.stamp);
    if (settings.races)
      block.shadow.landed(static_cast<uint32_t>(copy.to - block.shared), copy.bytes, agent, copy.stamp, own_access());
  }
  queue.drop_waited();
}

void enqueue(Pending work) {
  Cluster& cluster = *current->cluster;
  cluster.pending.push_back(std::move(work));
  if (happens_at_once(cluster)) run_pending(cluster, cluster.pending.size() - 1);
}

void run_pending(Cluster& cluster, size_t i) {
  const Pending work = std::move(cluster.pending[i]);
  cluster.pending.erase(cluster.pending.begin() + static_cast<ptrdiff_t>(i));
  work.run();
}

}  // namespace emulator
