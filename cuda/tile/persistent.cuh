// The life of a block: tile after tile, the first slices of the next one on their way while the last one is stored.
#pragma once
#include "tile/main_loop.cuh"

namespace tile {

// `kernel` says what is multiplied and what becomes of the sums:
//   Walk walk()                   the tiles
//   int start(tile, a, b)         points the operands at a tile and returns its length along K
//   void begin(tile, sums)        sums before the product
//   void finish(tile, sums)       stores them
template <class S, Major MA, Major MB, class Kernel, class A, class B>
PTX_D void run_tiles(const Kernel& kernel, A a, B b) {
  Ring<S> ring;
  auto walk = kernel.walk();
  typename decltype(walk)::Tile tile, next;
  if (!walk.next(tile)) return;
  int slices = ceil_div(kernel.start(tile, a, b), S::SLICE);
  fill<S>(ring, a, b, slices);
  for (bool more = true; more; tile = next) {
    typename S::Sums sums;
    kernel.begin(tile, sums);
    accumulate<S, MA, MB>(sums, ring, a, b, slices);
    more = walk.next(next);
    if (more) {
      slices = ceil_div(kernel.start(next, a, b), S::SLICE);
      fill<S>(BUG(tiles_first_place) ? Ring<S>() : ring, a, b, slices);
    }
    kernel.finish(tile, sums);
  }
}

}  // namespace tile
