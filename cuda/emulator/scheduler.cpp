#include "emulator/scheduler.h"

#include <bit>
#include <cstdio>

namespace emulator {
namespace {

// A set bit of `mask`, searched upwards from a random place.
int random_bit(uint32_t mask, uint32_t random) {
  const int turn = static_cast<int>(random % 32);
  return (std::countr_zero(std::rotr(mask, turn)) + turn) % 32;
}

int next_warp(const Cluster& cluster, const Warp* stay, uint32_t random) {
  if (settings.shuffle) return stay && stay->ready && random % 8 ? stay->id : random_bit(cluster.ready_warps, random >> 3);
  if (stay && stay->ready) return stay->id;
  const uint32_t above = stay && stay->id < 31 ? cluster.ready_warps & ~((2u << stay->id) - 1) : 0;
  return std::countr_zero(above ? above : cluster.ready_warps);
}

// A thread that can run, `stay`'s first; asynchronous work happens where there is none.
Fiber* pick(Cluster& cluster, const Warp* stay) {
  for (;;) {
    if (settings.shuffle && settings.completion != Completion::late && !cluster.pending.empty() && cluster.random() % 16 == 0)
      run_pending(cluster, cluster.random() % cluster.pending.size());
    if (cluster.ready_warps) {
      const uint32_t random = settings.shuffle ? cluster.random() : 0;
      const Warp& warp = cluster.warps[next_warp(cluster, stay, random)];
      const int lane = settings.shuffle ? random_bit(warp.ready, random >> 8) : std::countr_zero(warp.ready);
      return &cluster.fibers[warp.id * 32 + lane];
    }
    if (cluster.pending.empty()) return nullptr;
    run_pending(cluster, settings.completion == Completion::random ? cluster.random() % cluster.pending.size() : 0);
  }
}

[[noreturn]] void deadlock(const Cluster& cluster) {
  std::string report = "deadlock: no thread can run";
  char line[200];
  const auto add = [&](const auto&... arguments) {
    snprintf(line, sizeof line, arguments...);
    report += "\n    ";
    report += line;
  };
  for (const auto& block : cluster.blocks) {
    if (cluster.blocks.size() > 1) add("block %d:", block->id);
    const Fiber* threads = &cluster.fibers[block->rank * block->threads];
    for (int first = 0, next; first < block->threads && report.size() < 3000; first = next) {
      const Fiber& f = threads[first];
      for (next = first + 1; next < block->threads; next++) {
        const Fiber& g = threads[next];
        if (g.done != f.done || (!f.done && (g.waits_in != f.waits_in || g.waits_for != f.waits_for || g.where.line() != f.where.line()))) break;
      }
      if (f.done) add("threads %d..%d have returned", first, next - 1);
      else add("threads %d..%d wait in %s %u at %s", first, next - 1, f.waits_in, f.waits_for, short_place(f.where).c_str());
    }
    for (int i = 0; i < 16; i++)
      if (block->named[i].arrived) add("barrier %d: %d of %d threads have arrived", i, block->named[i].arrived, block->named[i].wanted);
    for (const auto& [offset, b] : block->mbarriers)
      add("mbarrier at shared byte %u: phase %u lacks %u of %u arrivals and %lld bytes", offset, b.phase, b.missing, b.count,
          static_cast<long long>(b.bytes));
  }
  if (cluster.all.arrived) add("sync_cluster: %d of %d threads have arrived", cluster.all.arrived, cluster.all.wanted);
  fail(current->where, "%s", report.c_str());
}

void go(Fiber* next) {
  Fiber* self = current;
  if (next == self) return;
  current = next;
  switch_to(self->context, next->context);
}

void set_not_ready(Fiber& f) {
  f.warp->ready &= ~(1u << f.lane);
  if (!f.warp->ready) f.cluster->ready_warps &= ~(1u << f.warp->id);
}

}  // namespace

void wake(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (lanes) warp.cluster->ready_warps |= 1u << warp.id;
}

void suspend(const char* what, uint32_t object, const Where& where) {
  current->waits_in = what;
  current->waits_for = object;
  current->where = where;
  set_not_ready(*current);
  Fiber* next = pick(*current->cluster, current->warp);
  if (!next) deadlock(*current->cluster);
  go(next);
}

void yield() {
  Cluster& cluster = *current->cluster;
  if (settings.shuffle) return go(pick(cluster, nullptr));
  const size_t own = current - cluster.fibers.data();
  for (size_t i = 1; i <= cluster.fibers.size(); i++) {  // round, so that who polls does not keep the others out
    Fiber& f = cluster.fibers[(own + i) % cluster.fibers.size()];
    if (f.warp->ready >> f.lane & 1) return go(&f);
  }
}

void finish() {
  Fiber& self = *current;
  Block& block = *self.block;
  Cluster& cluster = *self.cluster;
  Warp& warp = *self.warp;
  self.done = true;
  block.live--;
  cluster.live--;
  warp.live &= ~(1u << self.lane);
  if (warp.arrived) fail(warp.where, "lane %d returns from the kernel while others of its warp wait in %s", self.lane, warp.collective);
  for (size_t i = self.copies.first; i < self.copies.copies.size(); i++)
    if (!self.copies.copies[i].handed_over) fail(self.where, "a thread returns from the kernel with cp_async in flight");
  if (!self.stores.stores.empty()) fail(self.where, "a thread returns from the kernel without waiting for its TMA stores");
  if (!warp.products.products.empty()) fail(warp.products.products[0].where, "a thread returns from the kernel with wgmma in flight");
  if (block.named[0].arrived && block.named[0].arrived == block.live) complete(cluster, block.named[0]);
  if (cluster.all.arrived && cluster.all.arrived == cluster.live) complete(cluster, cluster.all);
  if (!block.live) block.end();
  set_not_ready(self);
  if (Fiber* next = pick(cluster, &warp)) {
    go(next);
  } else {
    if (cluster.live) deadlock(cluster);
    switch_to(self.context, cluster.host);
  }
}

}  // namespace emulator
