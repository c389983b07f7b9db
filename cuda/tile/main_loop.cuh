// The walk along K: a ring of slices in shared memory, filled ahead of the products.
#pragma once
#include "tile/fma.cuh"
#include "tile/fragments.cuh"
#include "tile/operand.cuh"

namespace tile {

template <class S> struct Ring {
  Shared base = shared_memory();
  uint32_t at = 0;

  PTX_D Shared slice() const { return base + at; }
  PTX_D void advance() { at = at == (S::STAGES - 1) * S::STAGE_BYTES ? 0 : at + S::STAGE_BYTES; }
};

template <class S, class A, class B> PTX_D void copy_slice(const Ring<S>& ring, A& a, B& b, bool wanted) {
  if (wanted) {
    a.copy(ring.slice());
    b.copy(ring.slice() + S::A_BYTES);
  }
  cp_async_commit();
}

// Begins to copy a tile's first slices; nobody may still read the ring.
template <class S, class A, class B> PTX_D void fill(Ring<S> ring, A& a, B& b, int slices) {
#pragma unroll
  for (int s = 0; s < S::STAGES; s++, ring.advance()) copy_slice(ring, a, b, s < slices);
}

// Waits for the slice behind this one and, all warps having read this one, fills its place again.
template <class S, class A, class B> PTX_D void next_slice(Ring<S>& ring, A& a, B& b, bool wanted) {
  if (BUG(slices_short_wait)) cp_async_wait<S::STAGES - 1>();
  else cp_async_wait<S::STAGES - 2>();
  if (!BUG(slices_no_barrier)) sync_block();
  if (BUG(slices_wrong_place)) ring.advance();
  copy_slice(ring, a, b, wanted);
  if (!BUG(slices_wrong_place)) ring.advance();
}

// c += A B^T over all slices of a tile that `fill` has begun. Every thread has read the ring when it returns.
//
// Fragments are read a step ahead of their product.
template <class S, Major MA, Major MB, class A, class B>
PTX_D void accumulate(typename S::Sums& c, Ring<S>& ring, A& a, B& b, int slices) {
  if (slices == 0) return;
  if (!BUG(slices_no_first_wait)) cp_async_wait<S::STAGES - 1>();
  if (!BUG(slices_no_first_barrier)) sync_block();
  if constexpr (std::is_same_v<typename S::Math, float>) {
#pragma unroll 1
    for (int ahead = S::STAGES; ahead < slices + S::STAGES; ahead++) {
      fma_slice<S, MA, MB>(c, ring.slice());
      next_slice(ring, a, b, ahead < slices);
    }
  } else {
    using T = typename S::Element;
    const FragmentReader<S, MA, MB> read;
    Fragments<S> even, odd;
    read(even, ring.slice(), 0);
#pragma unroll 1
    for (int ahead = S::STAGES; ahead < slices + S::STAGES - 1; ahead++) {
      read(odd, ring.slice(), 1);
      mma_tile<T>(c, even.a, even.b);
      next_slice(ring, a, b, ahead < slices);
      read(even, ring.slice(), 0);
      mma_tile<T>(c, odd.a, odd.b);
    }
    read(odd, ring.slice(), 1);
    mma_tile<T>(c, even.a, even.b);
    if (!BUG(slices_no_last_barrier)) sync_block();
    ring.advance();
    mma_tile<T>(c, odd.a, odd.b);
  }
}

}  // namespace tile
