// From a slice in shared memory to the registers of tensor cores.
//
// A step is 32 bytes along K: 16 elements of 16 bits or 8 of 32. A tile is 16 rows m or n by one step, read as four 8x8
// matrices (8x4 of 32-bit elements): their order is that of mma's registers, along m first in A, along k first in B.
#pragma once
#include "tile/shape.cuh"

namespace tile {

// What a lane knows of its places in an operand that extends SIZE along m or n. Tile i of the warp is distance(i) rows
// from tile 0; the offsets kept are those between which the swizzle makes a difference.
template <class S, int SIZE, Major MAJOR, bool IS_B> class Reader {
  using Element = typename S::Element;
  static constexpr bool TRANSPOSED = MAJOR == Major::MN, WIDE = sizeof(Element) == 4;
  static constexpr int TILES = IS_B ? NI / 2 : S::MI;
  static constexpr int PERIOD = TRANSPOSED && !WIDE && !IS_B ? 4 : 2;
  uint32_t offsets[TRANSPOSED && WIDE ? 4 : PERIOD];

  PTX_D static constexpr int distance(int i) { return IS_B ? i / 2 * (SIZE / 2) + i % 2 * 16 : i * 16; }
  // Bytes from tile i % PERIOD to tile i.
  PTX_D static constexpr int beyond(int i) {
    return (distance(i) - distance(i % PERIOD)) * static_cast<int>(sizeof(Element));
  }

 public:
  // `first` is the first row m or n of the warp's tile 0.
  explicit PTX_D Reader(int first) {
    const int lane = S::lane(), matrix = lane / 8;
    const int along = 8 * (IS_B ? matrix / 2 : matrix % 2), deep = IS_B ? matrix % 2 : matrix / 2;
    if constexpr (!TRANSPOSED) {
      for (int step = 0; step < 2; step++)
        offsets[step] = chunk_offset<Element, SIZE, MAJOR>(first + along + lane % 8, 2 * step + deep);
    } else if constexpr (!WIDE) {
      for (int i = 0; i < PERIOD; i++)
        offsets[i] = chunk_offset<Element, SIZE, MAJOR>(8 * deep + lane % 8, (first + distance(i) + along) / 8);
    } else {
      for (int i = 0; i < 4; i++) {
        const int row = first + distance(i / 2) + i % 2 * 8 + lane / 4;
        offsets[i] = chunk_offset<Element, SIZE, MAJOR>(lane % 4, row / 4) + row % 4 * 4;
      }
    }
  }

  PTX_D void tile(uint32_t (&r)[4], Shared slice, int i, int step) const {
    if constexpr (!TRANSPOSED) {
      const uint32_t offset = BUG(fragments_swizzle) ? offsets[0] + step * 32 : offsets[step];
      ldmatrix_x4(r, slice + (offset + distance(i) * SLICE_BYTES));
    } else if constexpr (!WIDE) {
      const uint32_t offset = BUG(fragments_swizzle_transposed) ? offsets[0] + distance(i % PERIOD) * 2 : offsets[i % PERIOD];
      ldmatrix_x4_trans(r, slice + (offset + beyond(i) + step * 16 * SIZE * 2));
    } else {
      for (int along = 0; along < 2; along++)
        for (int deep = 0; deep < 2; deep++)
          r[IS_B ? 2 * along + deep : 2 * deep + along] =
              load_shared<uint32_t>(slice + (offsets[i % 2 * 2 + along] + beyond(i) + (step * 8 + deep * 4) * SIZE * 4));
    }
    if constexpr (WIDE)
      for (int q = 0; q < 4; q++) r[q] = to_tf32(bits_float(r[q]));
  }
};

// What a warp multiplies in one step.
template <class S> struct Fragments {
  uint32_t a[S::MI][4], b[NI][2];
};

template <class S, Major A, Major B> class FragmentReader {
  Reader<S, S::BM, A, false> a{S::warp_row()};
  Reader<S, S::BN, B, true> b{S::run_column(0)};

 public:
  PTX_D void operator()(Fragments<S>& f, Shared slice, int step) const {
#pragma unroll
    for (int i = 0; i < S::MI; i++) a.tile(f.a[i], slice, i, step);
#pragma unroll
    for (int j = 0; j < NI; j += 2) {
      uint32_t r[4];
      b.tile(r, slice + S::A_BYTES, j / 2, step);
      f.b[j][0] = r[0], f.b[j][1] = r[1], f.b[j + 1][0] = r[2], f.b[j + 1][1] = r[3];
    }
  }
};

}  // namespace tile
