// Storage types, addresses, and what makes a function a kernel.
#pragma once
#include <cuda.h>
#include <stdint.h>

#include <type_traits>

#define PTX_D __device__ __forceinline__

// `name` is the entry point's symbol; `body` a device function of `const Params&`. The launch shape is kept beside it
// in the image, where the host reads it. The macro takes `Params` last because it may contain commas.
#define PTX_KERNEL(name, threads, min_blocks, shared_bytes, body, ...) \
  PTX_ENTRY(name, threads, shared_bytes, __launch_bounds__(threads, min_blocks), body, __VA_ARGS__)
// The same in clusters of two blocks (sm_90); the number of blocks is even.
#define PTX_CLUSTER_KERNEL(name, threads, min_blocks, shared_bytes, body, ...) \
  PTX_ENTRY(name, threads, shared_bytes, __launch_bounds__(threads, min_blocks) __cluster_dims__(2, 1, 1), body, __VA_ARGS__)
#define PTX_ENTRY(name, threads, shared_bytes, attributes, body, ...)               \
  extern "C" __device__ const uint32_t name##_launch[2] = {threads, shared_bytes}; \
  extern "C" __global__ void attributes name(const __grid_constant__ __VA_ARGS__ params) { body(params); }

namespace ptx {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class T> struct Global {
  T* at;
  PTX_D Global operator+(int64_t elements) const { return {at + elements}; }
  template <class U, class = std::enable_if_t<std::is_same_v<U, const T>>> PTX_D operator Global<U>() const { return {at}; }
  template <class U> PTX_D Global<U> as() const { return {reinterpret_cast<U*>(at)}; }
  PTX_D explicit operator bool() const { return at != nullptr; }
  PTX_D bool aligned(int bytes) const { return reinterpret_cast<uint64_t>(at) % bytes == 0; }
};

struct Shared {
  uint32_t at;
  PTX_D Shared operator+(uint32_t bytes) const { return {at + bytes}; }
};

}  // namespace ptx
