// Which tiles a block computes: block b the tiles b, b + blocks, b + 2 blocks, ... of one list over all experts.
//
// Within an expert the list goes through bands of 8 tiles along m, each column of a band at a time and every other band
// backwards, so that the blocks at work share rows of A and columns of B in the L2 cache.
// Blocks that work in pairs take two tiles of an expert at a time (pairs.cuh).
#pragma once
#include "tile/shape.cuh"

namespace tile {

PTX_D constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Place {
  int m, n;
  bool shares = false;  // an operand with the other block of the pair
};

PTX_D Place place_in_bands(int tile, int tiles_m, int tiles_n) {
  constexpr int BAND = 8;
  const int band = tile / (BAND * tiles_n), first = band * BAND, within = tile - first * tiles_n;
  const int height = tiles_m - first < BAND && !BUG(walk_last_band) ? tiles_m - first : BAND;
  const int n = within / height;
  return {first + within % height, band % 2 ? tiles_n - 1 - n : n};
}

// The tiles of an expert, each by itself.
struct Singly {
  PTX_D static int first() { return block_id(); }
  PTX_D static int step() { return block_count(); }
  PTX_D static int count(int tiles_m, int tiles_n) { return tiles_m * tiles_n; }
  PTX_D static Place place(int tile, int tiles_m, int tiles_n) { return place_in_bands(tile, tiles_m, tiles_n); }
};

// First row of expert e; offsets beyond the rows do no harm.
PTX_D int row_offset(Global<const int> offsets, int e, int rows) {
  const int row = load_readonly(offsets + e);
  return row < 0 ? 0 : row < rows || BUG(walk_any_offset) ? row : rows;
}

struct RowTile {
  int expert;      // E: no expert's rows
  int row, end;    // the tile's first sorted row, the end of the expert's; a tile that is missing has no rows
  int n;           // index along n
  bool used, shares;
};

// Tiles over the sorted rows: those of each expert, then the unused ones behind the last expert as one more.
template <class Teams> class RowWalk {
  Global<const int> offsets;
  int experts, rows, tile_rows, tiles_n;
  int tile = Teams::first() - Teams::step();
  int begin = 0, end = 0;  // the expert's tiles
  int expert = -1, first = 0, last = 0;

  PTX_D int offset(int e) const { return e > experts ? rows : row_offset(offsets, e, rows); }

  // A warp looks at 32 experts at a time. False where there are no more tiles.
  PTX_D bool find_expert() {
    for (int from = expert + 1; from <= experts; from += 32) {
      const int lane = thread_id() % 32, e = from + lane < experts ? from + lane : experts;
      const int row = offset(e), next = offset(e + 1);
      const int tiles = from + lane <= experts - BUG(walk_no_unused_rows) && next > row ? Teams::count(ceil_div(next - row, tile_rows), tiles_n) : 0;
      int sum = tiles;
      for (int delta = 1; delta < 32; delta *= 2) {
        const int below = shfl_up(sum, delta);
        if (lane >= delta) sum += below;
      }
      if (const uint32_t found = ptx::ballot(tile < end + sum)) {
        const int who = lowest_bit(found);
        const auto of_who = [&](int value) { return redux_add(lane == who ? value : 0); };
        end += of_who(sum);
        begin = end - of_who(tiles);
        expert = from + who;
        first = of_who(row);
        last = BUG(walk_past_expert) ? rows : of_who(next);
        return true;
      }
      if (!BUG(walk_no_carry)) end += redux_add(tiles);
    }
    return false;
  }

 public:
  using Tile = RowTile;

  PTX_D RowWalk(Global<const int> offsets, int experts, int rows, int tile_rows, int tiles_n)
      : offsets(offsets), experts(experts), rows(rows), tile_rows(tile_rows), tiles_n(tiles_n) {}

  PTX_D bool next(Tile& out) {
    tile += Teams::step();
    if (tile >= end && !find_expert()) return false;
    const Place place = Teams::place(tile - begin, ceil_div(last - first, tile_rows), tiles_n);
    const int row = first + place.m * tile_rows;
    out = {expert, row, place.n < tiles_n ? last : row, place.n, expert < experts, place.shares};
    return true;
  }
};

struct MatrixTile {
  int expert, m, n;
  bool shares;
};

// Tiles over matrices of one size, one for each expert; a tile that is missing is below the last row.
template <class Teams> class MatrixWalk {
  int tile = Teams::first() - Teams::step();
  int experts, tiles_m, tiles_n;

 public:
  using Tile = MatrixTile;

  PTX_D MatrixWalk(int experts, int tiles_m, int tiles_n) : experts(experts), tiles_m(tiles_m), tiles_n(tiles_n) {}

  PTX_D bool next(Tile& out) {
    tile += Teams::step();
    const int of_expert = Teams::count(tiles_m, tiles_n), expert = tile / of_expert;
    if (expert >= experts) return false;
    const Place place = Teams::place(tile - expert * of_expert, tiles_m, tiles_n);
    out = {expert, place.n < tiles_n ? place.m : tiles_m, place.n, place.shares};
    return true;
  }
};

}  // namespace tile
