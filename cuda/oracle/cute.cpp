#include "oracle/cute.h"

#include <cstddef>
#include <cstdlib>

// Where CuTe's tensors lie. Elsewhere than on a GPU, it has to be told how a pointer becomes an address in shared memory.
alignas(1024) static char shared_memory[256 * 128];
static size_t __cvta_generic_to_shared(const void* at) { return static_cast<const char*>(at) - shared_memory; }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cute/tensor.hpp>
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace oracle {
namespace {

using namespace cute;
namespace GMMA = SM90::GMMA;

template <class Atom> constexpr Fragments fragments = {
    [](int lane, int value) { return int(typename MMA_Traits<Atom>::ALayout()(lane, value)); },
    [](int lane, int value) { return int(typename MMA_Traits<Atom>::BLayout()(lane, value)); },
    [](int lane, int value) { return int(typename MMA_Traits<Atom>::CLayout()(lane, value)); }};

// Source and destination of a copy both number its bits.
template <class Atom> int source(int lane, int value) {
  using Copy = Copy_Traits<Atom>;
  const auto bit = typename Copy::DstLayout()(lane, value * 16);
  for (int from = 0; from < 256; from++)
    if (typename Copy::SrcLayout()(from / 8, from % 8 * 16) == bit) return from;
  std::abort();
}

using T = cutlass::bfloat16_t;
template <class Rows> auto tile(C<GMMA::Major::K>, Rows rows) { return tile_to_shape(GMMA::Layout_K_SW128_Atom<T>(), make_shape(rows, _64())); }
// Atoms are contiguous along K.
template <class Rows> auto tile(C<GMMA::Major::MN>, Rows rows) {
  return tile_to_shape(GMMA::Layout_MN_SW128_Atom<T>(), make_shape(rows, _64()), Step<_2, _1>());
}

// function(Major, rows), both as types
template <class Function> auto with_tile(bool mn_major, int rows, Function function) {
  const auto of_major = [&](auto major) {
    switch (rows) {
      case 64: return function(major, _64());
      case 128: return function(major, _128());
      case 256: return function(major, _256());
    }
    std::abort();
  };
  return mn_major ? of_major(C<GMMA::Major::MN>()) : of_major(C<GMMA::Major::K>());
}

}  // namespace

const Fragments bf16_16x8x16 = fragments<SM80_16x8x16_F32BF16BF16F32_TN>;
const Fragments f16_16x8x16 = fragments<SM80_16x8x16_F32F16F16F32_TN>;
const Fragments tf32_16x8x8 = fragments<SM80_16x8x8_F32TF32TF32F32_TN>;

int matrix_element(bool transposed, int lane, int value) {
  return transposed ? source<SM75_U16x8_LDSM_T>(lane, value) : source<SM75_U32x4_LDSM_N>(lane, value);
}

int accumulator(int columns, int thread, int value) {
  switch (columns) {
    case 64: return GMMA::CLayout_64xN<64>()(thread, value);
    case 128: return GMMA::CLayout_64xN<128>()(thread, value);
    case 256: return GMMA::CLayout_64xN<256>()(thread, value);
  }
  std::abort();
}

uint32_t tile_byte(bool mn_major, int rows, int row, int k) {
  return with_tile(mn_major, rows, [&](auto major, auto rows) -> uint32_t {
    return as_position_independent_swizzle_layout(tile(major, rows))(row, k) * sizeof(T);
  });
}

uint64_t descriptor(bool mn_major, int rows, int step) {
  return with_tile(mn_major, rows, [&](auto major, auto rows) -> uint64_t {
    const auto tensor = make_tensor(make_smem_ptr(reinterpret_cast<T*>(shared_memory)), tile(major, rows));
    return GMMA::make_gmma_desc<decltype(major)::value>(local_tile(tensor, make_shape(rows, _16()), make_coord(0, step)));
  });
}

}  // namespace oracle
