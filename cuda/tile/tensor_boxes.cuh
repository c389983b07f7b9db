// From tensors to boxes in shared memory, by the tensor memory accelerator. One thread asks for the boxes of a slice, and
// the barrier of its place counts their bytes.
//
// Where the two blocks of a cluster take the same of an operand, each asks for half of it, for both.
#pragma once
#include "tile/boxes.cuh"

namespace tile {

// Parameters of a kernel behind its tensor maps, of boxes of 64 elements along memory: those operands that come by them, what
// else is read, and what is written.
template <class Params> struct Mapped {
  TensorMap a, b, in[2], out[3];
  Params params;
};

// As Boxes, with the same layout. What lies outside the tensor becomes zeros, but a right half that is not there is left as it
// is; rows of another expert may come along with those of the tile, which are no one's results.
template <class S, int SIZE, Major MAJOR> class TensorBoxes {
  static constexpr bool ALONG_K = MAJOR == Major::K;
  static constexpr int HALF = SIZE / 2, BOXES = ALONG_K ? 1 : HALF / BOX;  // BOXES of either half
  static constexpr int BOX_BYTES = HALF / BOXES * BOX_ROW_BYTES, NOWHERE = 1 << 30;
  const TensorMap* map;
  int at[2];      // first row (K-major) or column of either half
  int k, matrix;

  PTX_D void copy_half(int half, Shared to, Shared full, bool shared) const {
#pragma unroll
    for (int i = 0; i < BOXES; i++) {
      const int place = at[half] + i * BOX, x = ALONG_K ? k : place, y = ALONG_K ? place : k;
      if (shared) tma_load_pair(to + i * BOX_BYTES, map, full, x, y, matrix);
      else tma_load(to + i * BOX_BYTES, map, full, x, y, matrix);
    }
  }

 public:
  explicit PTX_D TensorBoxes(const TensorMap& of) : map(&of) {
    if (thread_id() == 0) prefetch_tensor_map(map);
  }
  template <class Place> PTX_D void start(const Rows<typename S::Element>& rows, int, Place place) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int first = place(half * HALF);
      at[half] = first < 0 ? NOWHERE : first;
    }
    k = rows.first;
    matrix = rows.matrix;
  }
  PTX_D void copy(Shared slice, Shared full, bool shared) {
    if (thread_id() == 0) {
      const int halves = at[1] == NOWHERE ? 1 : 2;
      mbarrier_expect(full, (BUG(box_expects_missing) ? 2 : halves) * BOXES * BOX_BYTES);
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (half < halves && (!shared || half == cluster_rank())) copy_half(half, slice + half * BOXES * BOX_BYTES, full, shared);
    }
    k += S::SLICE;
  }
};

// Whether threads copy an operand, or some of it.
template <class Boxes> constexpr bool BY_THREADS = true;
template <class S, int SIZE, Major MAJOR> constexpr bool BY_THREADS<TensorBoxes<S, SIZE, MAJOR>> = false;

// Rows in memory along M or N, of which the last slice takes what is left: threads copy that one, since the next expert's
// rows behind them would be multiplied, by zeros, but may be NaN.
template <class S, int SIZE> class TensorRows {
  TensorBoxes<S, SIZE, Major::MN> whole;
  Boxes<S, SIZE, Major::MN, false> rest;
  int slices;  // whole ones

 public:
  explicit PTX_D TensorRows(const TensorMap& of) : whole(of) {}
  template <class Place> PTX_D void start(const Rows<typename S::Element>& rows, int k, Place place) {
    slices = k / S::SLICE;
    whole.start(rows, k, place);
    rest.start(rows.from(slices * S::SLICE), k % S::SLICE, place);
  }
  PTX_D void copy(Shared slice, Shared full, bool shared) {
    if (slices-- > 0) whole.copy(slice, full, shared);
    else rest.copy(slice, full, shared);
  }
};

}  // namespace tile
