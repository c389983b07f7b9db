// Which tiles the two blocks of a cluster compute (sm_90): two of an expert at a time, in one list of pairs.
#pragma once
#include "tile/walk.cuh"

namespace tile {

// Two by two: neighbours along m, which share their columns of B, then those of an odd last row, neighbours along n. The
// last of these may be missing: its n is that of no tile.
struct ByRows {
  PTX_D static int first() { return block_id() / 2; }
  PTX_D static int step() { return block_count() / 2; }
  PTX_D static int count(int tiles_m, int tiles_n) { return tiles_m / 2 * tiles_n + tiles_m % 2 * ceil_div(tiles_n, 2); }
  PTX_D static Place place(int pair, int tiles_m, int tiles_n) {
    const int sharing = tiles_m / 2 * tiles_n;
    if (pair >= sharing) return {tiles_m - 1, 2 * (pair - sharing) + cluster_rank(), false};
    const Place place = place_in_bands(pair, tiles_m / 2, tiles_n);
    return {2 * place.m + cluster_rank(), place.n, cluster_rank() == 0 || !BUG(walk_second_alone)};
  }
};

}  // namespace tile
