// Finds accesses to shared memory that nothing orders, with vector clocks.
//
// An agent is a warp, or the asynchronous work that a warp has issued. A warp's clock counts its releases (arrivals on
// barriers); its asynchronous agent's counts the operations issued. Every access is stamped with the clock of its
// agent, and every warp knows up to which stamp of every agent it has synchronised. Two accesses to the same bytes, one
// of them a write, are a race if the later one's warp does not know of the earlier one. Between lanes of one warp, only
// sync_warp and barriers order accesses. A second clock of the same kind says which writes a proxy fence has passed.
//
// The record is per granule of 16 bytes, with a mask of the bytes touched: one last write, and a last read per agent.
#pragma once
#include <cstdint>
#include <vector>

#include "emulator/failure.h"

namespace emulator {

constexpr int max_warps = 32, max_agents = 2 * max_warps;

struct alignas(32) Clock {
  uint32_t of[max_agents] = {};
  void join(const Clock& other, int agents) {
    for (int i = 0; i < agents; i++) of[i] = of[i] > other.of[i] ? of[i] : other.of[i];
  }
};

// Which stamps have been synchronised with, and which of those writes have passed fence_proxy_async.
struct Knowledge {
  Clock seen, fenced;
  void join(const Knowledge& other, int agents) {
    seen.join(other.seen, agents);
    fenced.join(other.fenced, agents);
  }
};

constexpr uint8_t no_lane = 255, several_lanes = 254;

struct Access {
  int agent;
  uint32_t stamp;
  int warp;
  uint8_t lane;    // no_lane: no thread does it
  uint32_t epoch;  // of the warp: how often its lanes have synchronised
  bool atomic = false;
  bool generic_proxy = true;
};

class Shadow {
 public:
  void resize(uint32_t bytes, int warps);
  void read(uint32_t offset, uint32_t bytes, const Access& access, const Knowledge& known, const Where& where) {
    by_granule(offset, bytes, [&](uint32_t g, int first, int count) { read_granule(g, first, count, access, known, where); });
  }
  void write(uint32_t offset, uint32_t bytes, const Access& access, const Knowledge& known, const Where& where) {
    by_granule(offset, bytes, [&](uint32_t g, int first, int count) { write_granule(g, first, count, access, known, where); });
  }
  // The cp.async of this stamp has been waited for: from now on it is a write by the thread that waited.
  void landed(uint32_t offset, int bytes, int async_agent, uint32_t stamp, const Access& access) {
    Write& w = writes_[offset / 16];
    if (w.agent != async_agent || w.stamp != stamp) return;
    w.agent = static_cast<uint8_t>(access.agent);
    w.stamp = access.stamp;
    writers_[offset / 16].touch(access, static_cast<int>(offset % 16), bytes, w.where);
  }
  // For a read by the asynchronous proxy.
  void check_fenced(uint32_t offset, const Knowledge& known, const Where& where) const {
    const Write& w = writes_[offset / 16];
    if (w.generic_proxy && w.stamp > known.fenced.of[w.agent]) fail_unfenced(offset / 16, where);
  }

 private:
  struct Lanes {  // who touched which byte since the warp's lanes last synchronised
    uint32_t epoch = 0;
    uint8_t warp = 0;
    uint8_t of[16] = {};
    Where where;
    bool current(const Access& a) const { return warp == a.warp && epoch == a.epoch; }
    bool conflict(const Access& a, int first, int count) const {
      if (!current(a) || a.lane == no_lane) return false;
      bool other = false;
      for (int i = first; i < first + count; i++) other |= (of[i] != a.lane) & (of[i] != no_lane);
      return other;
    }
    void touch(const Access& a, int first, int count, const Where& at) {
      if (!current(a)) {
        epoch = a.epoch;
        warp = static_cast<uint8_t>(a.warp);
        for (uint8_t& lane : of) lane = no_lane;
      }
      for (int i = first; i < first + count; i++) of[i] = of[i] == no_lane || of[i] == a.lane ? a.lane : several_lanes;
      where = at;
    }
  };
  struct Write {
    uint32_t stamp = 0;
    uint16_t bytes = 0;
    uint8_t agent = 0;
    bool atomic = false, generic_proxy = false;
    Where where;
  };

  template <class Visit> static void by_granule(uint32_t offset, uint32_t bytes, Visit&& visit) {
    for (const uint32_t end = offset + bytes; offset < end;) {
      const uint32_t part = end - offset < 16 - offset % 16 ? end - offset : 16 - offset % 16;
      visit(offset / 16, static_cast<int>(offset % 16), static_cast<int>(part));
      offset += part;
    }
  }
  static uint16_t mask(int first, int count) { return static_cast<uint16_t>(((1u << count) - 1) << first); }

  // A read or a write after what was last written.
  void after_write(const char* what, uint32_t g, int first, int count, const Access& a, const Knowledge& known, const Where& where) const {
    const Write& w = writes_[g];
    if (!(w.bytes & mask(first, count)) || (w.atomic && a.atomic)) return;
    if (w.stamp > known.seen.of[w.agent]) fail_race(what, g, w.agent, "write", w.where, where);
    if (writers_[g].conflict(a, first, count)) fail_lanes(what, g, writers_[g].of[first], "write", writers_[g].where, where);
  }

  void read_granule(uint32_t g, int first, int count, const Access& a, const Knowledge& known, const Where& where) {
    after_write("read", g, first, count, a, known, where);
    const size_t at = size_t(g) * agents_ + a.agent;
    const uint16_t bytes = mask(first, count);
    read_bytes_[at] = read_stamps_[at] == a.stamp ? read_bytes_[at] | bytes : bytes;
    read_stamps_[at] = a.stamp;
    readers_[g].touch(a, first, count, where);
  }

  void write_granule(uint32_t g, int first, int count, const Access& a, const Knowledge& known, const Where& where) {
    after_write("write", g, first, count, a, known, where);
    const uint32_t* stamps = &read_stamps_[size_t(g) * agents_];
    const uint16_t bytes = mask(first, count);
    bool unordered = false;
    for (int i = 0; i < agents_; i++) unordered |= stamps[i] > known.seen.of[i];
    for (int i = 0; unordered && i < agents_; i++)
      if (stamps[i] > known.seen.of[i] && (read_bytes_[size_t(g) * agents_ + i] & bytes))
        fail_race("write", g, i, "read", readers_[g].where, where);
    if (readers_[g].conflict(a, first, count)) fail_lanes("write", g, readers_[g].of[first], "read", readers_[g].where, where);
    Write& w = writes_[g];
    const bool same = w.agent == a.agent && w.stamp == a.stamp && w.atomic == a.atomic;
    w = {a.stamp, static_cast<uint16_t>(same ? w.bytes | bytes : bytes), static_cast<uint8_t>(a.agent), a.atomic, a.generic_proxy, where};
    writers_[g].touch(a, first, count, where);
  }

  [[noreturn]] void fail_race(const char* what, uint32_t granule, int agent, const char* earlier, const Where& then, const Where& where) const;
  [[noreturn]] void fail_lanes(const char* what, uint32_t granule, int lane, const char* earlier, const Where& then, const Where& where) const;
  [[noreturn]] void fail_unfenced(uint32_t granule, const Where& where) const;

  int agents_ = 0;
  std::vector<Write> writes_;
  std::vector<Lanes> writers_, readers_;
  std::vector<uint32_t> read_stamps_;  // [granule][agent]
  std::vector<uint16_t> read_bytes_;
};

}  // namespace emulator
