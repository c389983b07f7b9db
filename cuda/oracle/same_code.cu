// Each instruction of ptx/device beside the same one of NVIDIA's own headers (cuda::ptx, CUTLASS, the CUDA runtime). The
// kernels ours_<name> and theirs_<name> must compile to the same machine code; alone_<name> has no counterpart in
// them. tests/test_cuda_instructions.py compares, and knows what to expect of the latter.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include <cuda/ptx>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include "ptx/ptx.cuh"

namespace theirs = cuda::ptx;
namespace GMMA = cute::SM90::GMMA;

#define PAIR(name, parameters, ours, ...)                                                \
  extern "C" __global__ void __launch_bounds__(384, 1) ours_##name parameters { ours; } \
  extern "C" __global__ void __launch_bounds__(384, 1) theirs_##name parameters { __VA_ARGS__; }

#define ALONE(name, parameters, ours) extern "C" __global__ void alone_##name parameters { ours; }

template <class T> __device__ T* at(uint32_t shared) { return static_cast<T*>(__cvta_shared_to_generic(shared)); }
__device__ uint64_t* barrier(uint32_t shared) { return at<uint64_t>(shared); }

// ---- mbarrier.cuh
PAIR(mbarrier_init, (uint32_t b, uint32_t n), ptx::mbarrier_init({b}, n), theirs::mbarrier_init(barrier(b), n))
PAIR(mbarrier_arrive, (uint32_t b), ptx::mbarrier_arrive({b}), theirs::mbarrier_arrive(barrier(b)))
PAIR(mbarrier_arrive_expect, (uint32_t b, uint32_t n), ptx::mbarrier_arrive_expect({b}, n),
     theirs::mbarrier_arrive_expect_tx(theirs::sem_release, theirs::scope_cta, theirs::space_shared, barrier(b), n))
PAIR(mbarrier_expect, (uint32_t b, uint32_t n), ptx::mbarrier_expect({b}, n),
     theirs::mbarrier_expect_tx(theirs::sem_relaxed, theirs::scope_cta, theirs::space_shared, barrier(b), n))
PAIR(cp_async_mbarrier_arrive, (uint32_t b), ptx::cp_async_mbarrier_arrive({b}), cutlass::arch::cpasync_barrier_arrive_noinc(barrier(b)))
PAIR(mbarrier_try_wait, (uint32_t b, uint32_t parity, int* out), *out = ptx::mbarrier_try_wait({b}, parity),
     *out = theirs::mbarrier_try_wait_parity(barrier(b), parity))
PAIR(fence_mbarrier_init, (), ptx::fence_mbarrier_init(), theirs::fence_mbarrier_init(theirs::sem_release, theirs::scope_cluster))
PAIR(fence_proxy_async, (), ptx::fence_proxy_async(), theirs::fence_proxy_async(theirs::space_shared))
PAIR(elect_one, (int* out), *out = ptx::elect_one(), *out = cute::elect_one_sync())
PAIR(setmaxnreg_inc, (), ptx::setmaxnreg_inc<232>(), cutlass::arch::warpgroup_reg_alloc<232>())
PAIR(setmaxnreg_dec, (), ptx::setmaxnreg_dec<40>(), cutlass::arch::warpgroup_reg_dealloc<40>())
PAIR(grid_dependency_wait, (), ptx::grid_dependency_wait(), cutlass::arch::wait_on_dependent_grids())
PAIR(grid_dependency_launch, (), ptx::grid_dependency_launch(), cutlass::arch::launch_dependent_grids())

// ---- cluster.cuh
PAIR(cluster_rank, (uint32_t* out), *out = ptx::cluster_rank(), *out = cute::block_rank_in_cluster())
PAIR(sync_cluster, (), ptx::sync_cluster(), cute::cluster_sync())
PAIR(mbarrier_arrive_at, (uint32_t b, int rank), ptx::mbarrier_arrive_at({b}, rank),
     theirs::mbarrier_arrive(theirs::sem_release, theirs::scope_cluster, theirs::space_cluster, barrier(cute::set_block_rank(b, rank))))
PAIR(mbarrier_release_at, (uint32_t b, int rank), ptx::mbarrier_release_at({b}, rank),
     cutlass::arch::ClusterBarrier::arrive(barrier(b), rank, true))

// ---- tma.cuh
#define MAP const __grid_constant__ ptx::TensorMap map
PAIR(prefetch_tensor_map, (MAP), ptx::prefetch_tensor_map(&map),
     cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map)))
PAIR(tma_load, (MAP, uint32_t to, uint32_t b, int x, int y, int z), ptx::tma_load({to}, &map, {b}, x, y, z), int xyz[3] = {x, y, z};
     theirs::cp_async_bulk_tensor(theirs::space_cluster, theirs::space_global, at<void>(to), &map, xyz, barrier(b)))
PAIR(tma_load_pair, (MAP, uint32_t to, uint32_t b, int x, int y, int z), ptx::tma_load_pair({to}, &map, {b}, x, y, z),
     int xyz[3] = {x, y, z};
     theirs::cp_async_bulk_tensor(theirs::space_cluster, theirs::space_global, at<void>(to), &map, xyz, barrier(b), uint16_t{3}))
PAIR(tma_store, (MAP, uint32_t from, int x, int y, int z), ptx::tma_store(&map, {from}, x, y, z), int xyz[3] = {x, y, z};
     theirs::cp_async_bulk_tensor(theirs::space_global, theirs::space_shared, &map, xyz, at<void>(from)))
PAIR(tma_store_commit, (), ptx::tma_store_commit(), theirs::cp_async_bulk_commit_group())
PAIR(tma_store_wait_read, (), ptx::tma_store_wait_read<1>(), theirs::cp_async_bulk_wait_group_read(theirs::n32_t<1>{}))
PAIR(tma_store_wait, (), ptx::tma_store_wait<1>(), theirs::cp_async_bulk_wait_group(theirs::n32_t<1>{}))

// ---- mma.cuh
template <class Multiply> __device__ void product(float* c, const uint32_t* a, const uint32_t* b, Multiply multiply) {
  float d[4] = {c[0], c[1], c[2], c[3]};
  uint32_t x[4] = {a[0], a[1], a[2], a[3]}, y[2] = {b[0], b[1]};
  multiply(d, x, y);
  for (int i = 0; i < 4; i++) c[i] = d[i];
}
template <class Atom> __device__ void their_product(float (&c)[4], uint32_t (&a)[4], uint32_t (&b)[2]) {
  Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]);
}
#define PRODUCT(name, T, Atom)                                                                             \
  PAIR(name, (float* c, const uint32_t* a, const uint32_t* b),                                             \
       product(c, a, b, [](auto& c, auto& a, auto& b) { ptx::mma<T>(c, a, b); }),                          \
       product(c, a, b, [](auto& c, auto& a, auto& b) { their_product<cute::Atom>(c, a, b); }))
PRODUCT(mma_bf16, ptx::bf16, SM80_16x8x16_F32BF16BF16F32_TN)
PRODUCT(mma_f16, ptx::f16, SM80_16x8x16_F32F16F16F32_TN)
PRODUCT(mma_tf32, float, SM80_16x8x8_F32TF32TF32F32_TN)

template <class Load> __device__ void matrices(uint32_t* out, Load load) {
  uint32_t r[4];
  load(r);
  for (int i = 0; i < 4; i++) out[i] = r[i];
}
PAIR(ldmatrix_x4, (uint32_t* out, uint32_t row), matrices(out, [&](auto& r) { ptx::ldmatrix_x4(r, {row}); }),
     matrices(out, [&](auto& r) { cute::SM75_U32x4_LDSM_N::copy(*at<cute::uint128_t>(row), r[0], r[1], r[2], r[3]); }))
PAIR(ldmatrix_x4_trans, (uint32_t* out, uint32_t row), matrices(out, [&](auto& r) { ptx::ldmatrix_x4_trans(r, {row}); }),
     matrices(out, [&](auto& r) { cute::SM75_U16x8_LDSM_T::copy(*at<cute::uint128_t>(row), r[0], r[1], r[2], r[3]); }))
template <class Store> __device__ void stored_matrices(const uint32_t* in, Store store) {
  const uint32_t r[4] = {in[0], in[1], in[2], in[3]};
  store(r);
}
PAIR(stmatrix_x4, (const uint32_t* in, uint32_t row), stored_matrices(in, [&](auto& r) { ptx::stmatrix_x4({row}, r); }),
     stored_matrices(in, [&](auto& r) { cute::SM90_U32x4_STSM_N::copy(r[0], r[1], r[2], r[3], *at<cute::uint128_t>(row)); }))
PAIR(stmatrix_x4_trans, (const uint32_t* in, uint32_t row), stored_matrices(in, [&](auto& r) { ptx::stmatrix_x4_trans({row}, r); }),
     stored_matrices(in, [&](auto& r) { cute::SM90_U16x8_STSM_T::copy(r[0], r[1], r[2], r[3], *at<cute::uint128_t>(row)); }))

// ---- cp_async.cuh
#define COPY(bytes)                                                                                                     \
  PAIR(cp_async_##bytes, (uint32_t to, const void* from), ptx::cp_async<bytes>({to}, ptx::Global<const void>{from}, true), \
       __pipeline_memcpy_async(at<void>(to), from, bytes))                                                              \
  PAIR(cp_async_##bytes##_zeros, (uint32_t to, const void* from),                                                       \
       ptx::cp_async<bytes>({to}, ptx::Global<const void>{from}, false), __pipeline_memcpy_async(at<void>(to), from, bytes, bytes))
COPY(4)
COPY(8)
PAIR(cp_async_16, (uint32_t to, const cute::uint128_t* from, bool wanted), ptx::cp_async<16>({to}, ptx::Global<const void>{from}, wanted),
     cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*from, *at<cute::uint128_t>(to), wanted))
ALONE(cp_async_16_of_256, (uint32_t to, const void* from), (ptx::cp_async<16, 256>({to}, ptx::Global<const void>{from}, true)))
PAIR(cp_async_commit, (), ptx::cp_async_commit(), __pipeline_commit())
PAIR(cp_async_wait, (), ptx::cp_async_wait<2>(), __pipeline_wait_prior(2))

// ---- warp.cuh
PAIR(bar_sync, (int id, int threads), ptx::bar_sync(id + cutlass::arch::NamedBarrier::ReservedNamedBarrierCount, threads),
     cutlass::arch::NamedBarrier::sync(threads, id))
PAIR(bar_arrive, (int id, int threads), ptx::bar_arrive(id + cutlass::arch::NamedBarrier::ReservedNamedBarrierCount, threads),
     cutlass::arch::NamedBarrier::arrive(threads, id))

// ---- math.cuh
PAIR(pack_bf16, (uint32_t* out, float low, float high), *out = ptx::pack<ptx::bf16>(low, high),
     *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(low, high))
PAIR(pack_f16, (uint32_t* out, float low, float high), *out = ptx::pack<ptx::f16>(low, high),
     *reinterpret_cast<__half2*>(out) = __floats2half2_rn(low, high))
PAIR(from_float_bf16, (uint16_t* out, float x), *out = ptx::from_float<ptx::bf16>(x).bits,
     *reinterpret_cast<__nv_bfloat16*>(out) = __float2bfloat16_rn(x))
PAIR(from_float_f16, (uint16_t* out, float x), *out = ptx::from_float<ptx::f16>(x).bits,
     *reinterpret_cast<__half*>(out) = __float2half_rn(x))
PAIR(to_float_f16, (float* out, uint16_t x), *out = ptx::to_float(ptx::f16{x}), *out = __half2float(__ushort_as_half(x)))
PAIR(to_tf32, (float* out, float x), *out = ptx::bits_float(ptx::to_tf32(x)), *out = nvcuda::wmma::__float_to_tf32(x))
ALONE(exp2_approx, (float* out, float x), *out = ptx::exp2_approx(x))
ALONE(rcp_approx, (float* out, float x), *out = ptx::rcp_approx(x))
ALONE(tanh_approx, (float* out, float x), *out = ptx::tanh_approx(x))

// ---- memory.cuh
ALONE(load_streaming, (uint4* out, const uint4* from), *out = ptx::load_streaming(ptx::Global<const uint4>{from}))

// ---- wgmma.cuh
PAIR(wgmma_fence, (), ptx::wgmma_fence(), cute::warpgroup_arrive())
PAIR(wgmma_commit, (), ptx::wgmma_commit(), cute::warpgroup_commit_batch())
PAIR(wgmma_wait, (), ptx::wgmma_wait<1>(), cute::warpgroup_wait<1>())

template <int N, class Multiply> __device__ void group_product(float* c, uint64_t a, uint64_t b, Multiply multiply) {
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = c[threadIdx.x * (N / 2) + i];
  ptx::wgmma_fence();
  multiply(d, a, b);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; i++) c[threadIdx.x * (N / 2) + i] = d[i];
}
template <class Atom, int... I>
__device__ void their_group_product(float* d, uint64_t a, uint64_t b, GMMA::ScaleOut scale, std::integer_sequence<int, I...>) {
  Atom::fma(a, b, d[I]..., scale);
}
#define WGMMA(N, T, ITS, TA, TB)                                                                                     \
  PAIR(wgmma_##N##_##T##_##TA##TB, (float* c, uint64_t a, uint64_t b, int accumulate),                               \
       group_product<N>(c, a, b, [&](auto& d, auto a, auto b) { ptx::wgmma<ptx::T, TA, TB>(d, a, b, accumulate); }), \
       group_product<N>(c, a, b, [&](auto& d, auto a, auto b) {                                                      \
         their_group_product<GMMA::MMA_64x##N##x16_F32##ITS##ITS##_SS<GMMA::Major(TA), GMMA::Major(TB)>>(             \
             d, a, b, GMMA::ScaleOut(accumulate != 0), std::make_integer_sequence<int, N / 2>());                    \
       }))
#define WGMMA_MAJORS(N, T, ITS) WGMMA(N, T, ITS, 0, 0) WGMMA(N, T, ITS, 0, 1) WGMMA(N, T, ITS, 1, 0) WGMMA(N, T, ITS, 1, 1)
WGMMA_MAJORS(64, bf16, BF16)
WGMMA_MAJORS(64, f16, F16)
WGMMA_MAJORS(128, bf16, BF16)
WGMMA_MAJORS(128, f16, F16)
WGMMA_MAJORS(256, bf16, BF16)
WGMMA_MAJORS(256, f16, F16)
