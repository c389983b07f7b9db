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

// c += A B^T over all slices of a tile that `fill` has begun. Every thread has read the ring when it returns.
//
// Fragments are read a step ahead of their product. Once all warps have read a slice its place is filled again.
template <class S, Major MA, Major MB, class A, class B>
PTX_D void accumulate(typename S::Sums& c, Ring<S>& ring, A& a, B& b, int slices) {
  if (slices == 0) return;
  cp_async_wait<S::STAGES - 1>();
  sync_block();
  if constexpr (std::is_same_v<typename S::Math, float>) {
#pragma unroll 1
    for (int ahead = S::STAGES; ahead < slices + S::STAGES; ahead++) {
      fma_slice<S, MA, MB>(c, ring.slice());
      cp_async_wait<S::STAGES - 2>();
      sync_block();
      copy_slice(ring, a, b, ahead < slices);
      ring.advance();
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
      cp_async_wait<S::STAGES - 2>();
      sync_block();
      copy_slice(ring, a, b, ahead < slices);
      ring.advance();
      read(even, ring.slice(), 0);
      mma_tile<T>(c, odd.a, odd.b);
    }
    read(odd, ring.slice(), 1);
    mma_tile<T>(c, even.a, even.b);
    sync_block();
    ring.advance();
    mma_tile<T>(c, odd.a, odd.b);
  }
}

}  // namespace tile
