// The one header that a kernel includes, and the only door to the machine: a thin function per instruction.
//
// Under nvcc the functions are inline PTX (device/). Under any other compiler they are an emulation with the same
// signatures (host/), which runs the kernels on the CPU and checks every access. Kernels hold no inline assembly and no
// bare CUDA intrinsic, so that all they do can be checked.
//
//   Global<T>   a pointer into global memory; it has no operator*, only load() and store() read and write it
//   Shared      a byte address in the shared memory of the block
//   bf16, f16   16 bits of storage; arithmetic is in float
//
// Grids are one-dimensional. A kernel is a function template over its parameter struct, made an entry point by
// PTX_KERNEL(name, threads, min_blocks, shared_bytes, body, Params), or by PTX_CLUSTER_KERNEL with the same arguments where
// pairs of blocks work together.
//
// BUG(name) is false. Only tests on the CPU make one of them true, to see that it is noticed (emulator/bug.h).
#pragma once
#ifdef __CUDACC__
#define BUG(name) false
#include "ptx/device/types.cuh"
#include "ptx/device/memory.cuh"
#include "ptx/device/warp.cuh"
#include "ptx/device/math.cuh"
#include "ptx/device/cp_async.cuh"
#include "ptx/device/mma.cuh"
#include "ptx/device/mbarrier.cuh"
#include "ptx/device/cluster.cuh"
#include "ptx/device/tma.cuh"
#include "ptx/device/wgmma.cuh"
#else
#include "ptx/host/ptx.h"
#endif
