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

int next_warp(const Block& block, const Warp* stay, uint32_t random) {
  if (settings.shuffle) return stay && stay->ready && random % 8 ? stay->id : random_bit(block.ready_warps, random >> 3);
  if (stay && stay->ready) return stay->id;
  const uint32_t above = stay && stay->id < 31 ? block.ready_warps & ~((2u << stay->id) - 1) : 0;
  return std::countr_zero(above ? above : block.ready_warps);
}

// A thread that can run, `stay`'s first; asynchronous work happens where there is none.
Fiber* pick(Block& block, const Warp* stay) {
  for (;;) {
    if (settings.shuffle && settings.completion != Completion::late && !block.pending.empty() && block.random() % 16 == 0)
      run_pending(block, block.random() % block.pending.size());
    if (block.ready_warps) {
      const uint32_t random = settings.shuffle ? block.random() : 0;
      const Warp& warp = block.warps[next_warp(block, stay, random)];
      const int lane = settings.shuffle ? random_bit(warp.ready, random >> 8) : std::countr_zero(warp.ready);
      return &block.fibers[warp.id * 32 + lane];
    }
    if (block.pending.empty()) return nullptr;
    run_pending(block, settings.completion == Completion::random ? block.random() % block.pending.size() : 0);
  }
}

[[noreturn]] void deadlock(const Block& block) {
  std::string report = "deadlock: no thread can run";
  char line[200];
  const int count = static_cast<int>(block.fibers.size());
  for (int first = 0, next; first < count && report.size() < 3000; first = next) {
    const Fiber& f = block.fibers[first];
    for (next = first + 1; next < count; next++) {
      const Fiber& g = block.fibers[next];
      if (g.done != f.done || (!f.done && (g.waits_in != f.waits_in || g.waits_for != f.waits_for || g.where.line() != f.where.line()))) break;
    }
    if (f.done) snprintf(line, sizeof line, "\n    threads %d..%d have returned", first, next - 1);
    else
      snprintf(line, sizeof line, "\n    threads %d..%d wait in %s %u at %s", first, next - 1, f.waits_in, f.waits_for,
               short_place(f.where).c_str());
    report += line;
  }
  for (int i = 0; i < 16; i++)
    if (block.named[i].arrived) {
      snprintf(line, sizeof line, "\n    barrier %d: %d of %d threads have arrived", i, block.named[i].arrived, block.named[i].wanted);
      report += line;
    }
  for (const auto& [offset, b] : block.mbarriers) {
    snprintf(line, sizeof line, "\n    mbarrier at shared byte %u: phase %u lacks %u of %u arrivals and %lld bytes", offset, b.phase, b.missing,
             b.count, static_cast<long long>(b.bytes));
    report += line;
  }
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
  if (!f.warp->ready) f.block->ready_warps &= ~(1u << f.warp->id);
}

}  // namespace

void wake(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (lanes) warp.block->ready_warps |= 1u << warp.id;
}

void suspend(const char* what, uint32_t object, const Where& where) {
  current->waits_in = what;
  current->waits_for = object;
  current->where = where;
  set_not_ready(*current);
  Fiber* next = pick(*current->block, current->warp);
  if (!next) deadlock(*current->block);
  go(next);
}

void yield() {
  Block& block = *current->block;
  if (settings.shuffle) return go(pick(block, nullptr));
  for (size_t i = 1; i <= block.fibers.size(); i++) {  // round, so that who polls does not keep the others out
    Fiber& f = block.fibers[(current->id + i) % block.fibers.size()];
    if (f.warp->ready >> f.lane & 1) return go(&f);
  }
}

void finish() {
  Fiber& self = *current;
  Block& block = *self.block;
  Warp& warp = *self.warp;
  self.done = true;
  block.live--;
  warp.live &= ~(1u << self.lane);
  if (warp.arrived) fail(warp.where, "lane %d returns from the kernel while others of its warp wait in %s", self.lane, warp.collective);
  for (size_t i = self.copies.first; i < self.copies.copies.size(); i++)
    if (!self.copies.copies[i].handed_over) fail(self.where, "a thread returns from the kernel with cp_async in flight");
  if (!self.stores.stores.empty()) fail(self.where, "a thread returns from the kernel without waiting for its TMA stores");
  if (!warp.products.products.empty()) fail(warp.products.products[0].where, "a thread returns from the kernel with wgmma in flight");
  NamedBarrier& all = block.named[0];
  if (all.arrived && all.arrived == block.live) complete(block, all);
  if (!block.live && !block.pending.empty()) fail(block.pending[0].where, "the block ends while this is in flight");
  set_not_ready(self);
  if (Fiber* next = pick(block, &warp)) {
    go(next);
  } else {
    if (block.live) deadlock(block);
    switch_to(self.context, block.host);
  }
}

}  // namespace emulator
