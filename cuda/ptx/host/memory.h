// device/memory.cuh on the CPU.
#pragma once
#include <cstring>

#include "emulator/memory.h"
#include "emulator/shared.h"
#include "ptx/host/types.h"

namespace ptx {

using Where = emulator::Where;

template <class T> std::remove_const_t<T> load(Global<T> from, Where where = Where::current()) {
  const T* at = from.host_address();
  if (emulator::current->polled == at) emulator::yield();  // who polls waits for another thread
  emulator::current->polled = at;
  emulator::preempt();
  emulator::check_load(at, sizeof(T), "load", where);
  asm volatile("" ::: "memory");
  return *at;
}
template <class T> T load_readonly(Global<const T> from, Where where = Where::current()) {
  emulator::check_load_readonly(from.host_address(), sizeof(T), "load_readonly", where);
  return *from.host_address();
}
inline uint4 load_streaming(Global<const uint4> from, Where where = Where::current()) {
  emulator::check_load_readonly(from.host_address(), sizeof(uint4), "load_streaming", where);
  return *from.host_address();
}
template <class T> void store(Global<T> to, T value, Where where = Where::current()) {
  emulator::preempt();
  emulator::check_store(to.host_address(), sizeof(T), "store", where);
  *to.host_address() = value;
}

inline Shared shared_memory() { return {emulator::shared_address(*emulator::current->block)}; }

template <class T> T load_shared(Shared from, Where where = Where::current()) {
  emulator::preempt();
  T value;
  memcpy(&value, emulator::read_shared(from.at, sizeof(T), "load_shared", where), sizeof(T));
  return value;
}
template <class T> void store_shared(Shared to, T value, Where where = Where::current()) {
  emulator::preempt();
  memcpy(emulator::write_shared(to.at, sizeof(T), false, "store_shared", where), &value, sizeof(T));
}

inline int atomic_add(Global<int> at, int value, Where where = Where::current()) {
  emulator::preempt();
  emulator::check_atomic(at.host_address(), sizeof(int), "atomic_add", where);
  return __atomic_fetch_add(at.host_address(), value, __ATOMIC_SEQ_CST);
}
inline int atomic_min(Global<int> at, int value, Where where = Where::current()) {
  emulator::preempt();
  emulator::check_atomic(at.host_address(), sizeof(int), "atomic_min", where);
  int old = __atomic_load_n(at.host_address(), __ATOMIC_SEQ_CST);
  while (value < old && !__atomic_compare_exchange_n(at.host_address(), &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
  return old;
}
inline int atomic_add_shared(Shared at, int value, Where where = Where::current()) {
  emulator::preempt();
  uint8_t* p = emulator::write_shared(at.at, sizeof(int), true, "atomic_add_shared", where);
  int old;
  memcpy(&old, p, sizeof old);
  const int sum = static_cast<int>(static_cast<uint32_t>(old) + static_cast<uint32_t>(value));
  memcpy(p, &sum, sizeof sum);
  return old;
}
inline int atomic_min_shared(Shared at, int value, Where where = Where::current()) {
  emulator::preempt();
  uint8_t* p = emulator::write_shared(at.at, sizeof(int), true, "atomic_min_shared", where);
  int old;
  memcpy(&old, p, sizeof old);
  if (value < old) memcpy(p, &value, sizeof value);
  return old;
}

}  // namespace ptx
