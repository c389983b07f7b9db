// device/warp.cuh on the CPU.
#pragma once
#include <bit>

#include "emulator/collective.h"
#include "ptx/host/memory.h"

namespace ptx {

inline int thread_id() { return emulator::current->id; }
inline int block_threads() { return emulator::current->block->threads; }
inline int block_id() { return emulator::current->block->id; }
inline int block_count() { return emulator::current->block->count; }

// Every lane gives a value; `combine(values, lane)` is what the lane receives.
template <class T, class Result = T, class Combine>
Result exchange(const char* what, T value, const Where& where, Combine&& combine) {
  struct Argument { T value; Result result; } argument{value, {}};
  emulator::together(what, argument, where, [&](Argument** lanes) {
    T values[32];
    for (int lane = 0; lane < 32; lane++) values[lane] = lanes[lane]->value;
    for (int lane = 0; lane < 32; lane++) lanes[lane]->result = combine(values, lane);
  });
  return argument.result;
}
template <class T> T shuffle(const char* what, T value, int from, const Where& where) {
  struct Argument { T value; int from; T result; } argument{value, from, value};
  emulator::together(what, argument, where, [](Argument** lanes) {
    for (int lane = 0; lane < 32; lane++) lanes[lane]->result = lanes[lanes[lane]->from & 31]->value;
  });
  return argument.result;
}

template <class T> T shfl(T value, int lane, Where where = Where::current()) { return shuffle("shfl", value, lane, where); }
template <class T> T shfl_xor(T value, int mask, Where where = Where::current()) {
  return shuffle("shfl_xor", value, emulator::current->lane ^ mask, where);
}
template <class T> T shfl_up(T value, int delta, Where where = Where::current()) {
  const int lane = emulator::current->lane;
  return shuffle("shfl_up", value, lane < delta ? lane : lane - delta, where);
}
inline uint32_t ballot(bool predicate, Where where = Where::current()) {
  return exchange<bool, uint32_t>("ballot", predicate, where, [](const bool* values, int) {
    uint32_t lanes = 0;
    for (int i = 0; i < 32; i++) lanes |= static_cast<uint32_t>(values[i]) << i;
    return lanes;
  });
}
inline uint32_t match_any(uint32_t value, Where where = Where::current()) {
  return exchange("match_any", value, where, [](const uint32_t* values, int lane) {
    uint32_t lanes = 0;
    for (int i = 0; i < 32; i++) lanes |= static_cast<uint32_t>(values[i] == values[lane]) << i;
    return lanes;
  });
}
inline uint32_t redux_max(uint32_t value, Where where = Where::current()) {
  return exchange("redux_max", value, where, [](const uint32_t* values, int) { return *std::max_element(values, values + 32); });
}
inline uint32_t redux_min(uint32_t value, Where where = Where::current()) {
  return exchange("redux_min", value, where, [](const uint32_t* values, int) { return *std::min_element(values, values + 32); });
}
inline int redux_add(int value, Where where = Where::current()) {
  return exchange("redux_add", value, where, [](const int* values, int) {
    uint32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += static_cast<uint32_t>(values[i]);
    return static_cast<int>(sum);
  });
}
inline void sync_warp(Where where = Where::current()) {
  int nothing = 0;
  emulator::together("sync_warp", nothing, where, [](int**) { emulator::current->warp->epoch++; });
}

inline void sync_block(Where where = Where::current()) { emulator::arrive_named(0, emulator::current->block->live, true, where); }
inline void bar_sync(int id, int threads, Where where = Where::current()) { emulator::arrive_named(id, threads, true, where); }
inline void bar_arrive(int id, int threads, Where where = Where::current()) { emulator::arrive_named(id, threads, false, where); }

}  // namespace ptx
