// device/types.cuh on the CPU.
#pragma once
#include <cstdint>
#include <type_traits>

#include "emulator/launch.h"

#define PTX_D inline

#define PTX_KERNEL(name, threads, min_blocks, shared_bytes, body, ...) PTX_ENTRY(name, threads, shared_bytes, 1, body, __VA_ARGS__)
#define PTX_CLUSTER_KERNEL(name, threads, min_blocks, shared_bytes, body, ...) \
  PTX_ENTRY(name, threads, shared_bytes, 2, body, __VA_ARGS__)
#define PTX_ENTRY(name, threads, shared_bytes, cluster, body, ...)                                                                  \
  static const emulator::Kernel name##_kernel(#name, threads, shared_bytes, cluster, sizeof(__VA_ARGS__), [](const void* params) { \
    static_assert(std::is_trivially_copyable_v<__VA_ARGS__>, "parameters are copied as bytes");                                     \
    body(*static_cast<const __VA_ARGS__*>(params));                                                                                  \
  });

// CUDA's vectors, as far as they serve as units of access.
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace ptx {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T> class Global {
 public:
  Global() = default;
  Global(T* at) : at_(at) {}
  Global operator+(int64_t elements) const { return {at_ + elements}; }
  operator Global<const T>() const requires(!std::is_const_v<T>) { return {at_}; }
  template <class U> Global<U> as() const { return {reinterpret_cast<U*>(at_)}; }
  explicit operator bool() const { return at_ != nullptr; }
  bool aligned(int bytes) const { return reinterpret_cast<uint64_t>(at_) % bytes == 0; }
  // For the emulator and the tests; the device half has no such member, so that no kernel can use it.
  T* host_address() const { return at_; }

 private:
  T* at_;
};

struct Shared {
  uint32_t at;
  Shared operator+(uint32_t bytes) const { return {at + bytes}; }
};

}  // namespace ptx
