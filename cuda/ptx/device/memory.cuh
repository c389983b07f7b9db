// Loads and stores of 1 to 16 bytes, and integer atomics. Addresses are aligned to the size of the access.
#pragma once
#include "ptx/device/types.cuh"

namespace ptx {

// Global memory that this kernel may also write.
template <class T> PTX_D T load(Global<T> from) { return *from.at; }
// Global memory that nobody writes while this kernel runs.
template <class T> PTX_D T load_readonly(Global<const T> from) { return __ldg(from.at); }
template <> PTX_D bf16 load_readonly(Global<const bf16> from) { return {__ldg(reinterpret_cast<const uint16_t*>(from.at))}; }
template <> PTX_D f16 load_readonly(Global<const f16> from) { return {__ldg(reinterpret_cast<const uint16_t*>(from.at))}; }
// Read once: kept out of the way of what is read again.
PTX_D uint4 load_streaming(Global<const uint4> from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(__cvta_generic_to_global(from.at)));
  return v;
}
template <class T> PTX_D void store(Global<T> to, T value) { *to.at = value; }

// The dynamic shared memory of the block, aligned to 1024 bytes.
PTX_D Shared shared_memory() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  return {static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared))};
}

template <class T> PTX_D T* generic(Shared at) { return static_cast<T*>(__cvta_shared_to_generic(at.at)); }
template <class T> PTX_D T load_shared(Shared from) { return *generic<const T>(from); }
template <class T> PTX_D void store_shared(Shared to, T value) { *generic<T>(to) = value; }

// Atomics exist for integers only, where the order of adding does not change the sum. They return the old value.
PTX_D int atomic_add(Global<int> at, int value) { return atomicAdd(at.at, value); }
PTX_D int atomic_min(Global<int> at, int value) { return atomicMin(at.at, value); }
PTX_D int atomic_add_shared(Shared at, int value) { return atomicAdd(generic<int>(at), value); }
PTX_D int atomic_min_shared(Shared at, int value) { return atomicMin(generic<int>(at), value); }

}  // namespace ptx
