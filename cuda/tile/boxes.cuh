// From global memory to boxes in shared memory, by the threads of the first warpgroup. Thread t copies chunks of 16 bytes,
// the (t % 8)-th of rows t / 8, t / 8 + 16, ..., all with the same swizzle; what lies outside the matrix becomes zeros.
// What is not gathered comes by tensor_boxes.cuh instead.
#pragma once
#include "tile/operand.cuh"
#include "tile/warpgroups.cuh"

namespace tile {

struct BoxChunk {
  static constexpr int APART = WARPGROUP / 8;  // rows from one of a thread's chunks to the next
  static constexpr int TWO_SLICES = 2 * BOX_ROW_BYTES;  // of a row along K, that L2 fetches at once

  PTX_D static int row() { return thread_id() / 8; }
  template <class S> PTX_D static int column() { return thread_id() % 8 * S::CHUNK; }
  PTX_D static Shared to(Shared box) {
    const uint32_t chunk = BUG(box_swizzle) ? thread_id() % 8 : (thread_id() % 8) ^ (row() & 7);
    return box + (row() * BOX_ROW_BYTES + chunk * CHUNK_BYTES);
  }
};

// The copies of a thread, as Operand in operand.cuh, with what it does not look at: the barrier that counts bytes, and
// whether the other block of the pair takes the same. The places of either half of the tile follow each other in memory, as
// far as they are there. K-major, a box has the SIZE rows m or n of a slice; MN-major, SIZE / 64 boxes have its 64 rows k.
template <class S, int SIZE, Major MAJOR, bool GATHER> class Boxes;

template <class S, int SIZE> class Boxes<S, SIZE, Major::K, true> : BoxChunk {
  using Element = typename S::Element;
  static constexpr int COPIES = SIZE / APART;
  Global<const uint8_t> from;  // row 0, at k
  int pitch;                   // bytes between rows
  int found[COPIES];           // the rows, -1 where there is none
  int left;                    // elements from k on

 public:
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k_end, Place place) {
    left = k_end - column<S>();
    from = (rows.base + column<S>()).template as<const uint8_t>();
    pitch = rows.pitch * sizeof(Element);
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int at = place(row() + i * APART);
      found[i] = at < 0 ? -1 : BUG(box_not_gathered) ? at : rows.index(at);
    }
  }
  PTX_D void copy(Shared slice, Shared, bool) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const Global<const uint8_t> row = from + static_cast<int64_t>(found[i]) * pitch;
      cp_async<CHUNK_BYTES, TWO_SLICES>(to(slice) + i * APART * BOX_ROW_BYTES, row.template as<const void>(), found[i] >= 0 && left > 0);
    }
    from = from + BOX_ROW_BYTES;
    left -= S::SLICE;
  }
};

// The boxes of an MN-major operand that exist, and where a thread's chunks are in a row.
template <class S, int SIZE> struct BoxColumns : BoxChunk {
  static constexpr int BOXES = SIZE / BOX, ROWS = S::SLICE / APART;
  int first, right;  // bytes to the first chunk of the left half, and from there to that of the right one
  uint32_t exists;

  template <class Place> PTX_D void start(Place place) {
    const int left = place(column<S>()), other = place(SIZE / 2 + column<S>());
    first = (left < 0 ? 0 : left) * sizeof(typename S::Element);
    right = other < 0 ? 0 : (other - left) * sizeof(typename S::Element);
    exists = 0;
#pragma unroll 1
    for (int box = 0; box < BOXES; box++)
      exists |= static_cast<uint32_t>(place(box * BOX + column<S>()) >= 0 || BUG(box_missing_column)) << box;
  }
  // Copies the thread's chunks of its i-th row, which exists or not; the first is at `row`.
  PTX_D void copy_row(Shared slice, int i, Global<const uint8_t> row, bool there) const {
    const Global<const uint8_t> half[2] = {row, row + right};
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
      const Global<const uint8_t> from = half[2 * box / BOXES] + box % (BOXES / 2) * BOX_ROW_BYTES;
      cp_async<CHUNK_BYTES>(to(slice) + (box * S::SLICE + i * APART) * BOX_ROW_BYTES, from.template as<const void>(), there && (exists >> box & 1));
    }
  }
};

template <class S, int SIZE> class Boxes<S, SIZE, Major::MN, false> {
  using Element = typename S::Element;
  using Columns = BoxColumns<S, SIZE>;
  Columns columns;
  Global<const uint8_t> from;  // the thread's first chunk of the slice
  int64_t pitch;               // bytes between rows
  int left;                    // rows from there to the end

 public:
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k, Place place) {
    columns.start(place);
    pitch = rows.pitch * sizeof(Element);
    from = rows.at(Columns::row()).template as<const uint8_t>() + columns.first;
    left = k - Columns::row();
  }
  PTX_D void copy(Shared slice, Shared, bool) {
#pragma unroll
    for (int i = 0; i < Columns::ROWS; i++)
      columns.copy_row(slice, i, from + i * Columns::APART * pitch, i * Columns::APART < left + BUG(box_rows_tail));
    from = from + S::SLICE * pitch;
    left -= S::SLICE;
  }
};

// Rows that may be gathered, by indices that are asked for one slice ahead and not looked at before that slice's turn.
template <class S, int SIZE> class Boxes<S, SIZE, Major::MN, true> {
  using Element = typename S::Element;
  using Columns = BoxColumns<S, SIZE>;
  Columns columns;
  Global<const uint8_t> from;  // the thread's first chunk of row 0
  int pitch, count;            // bytes between rows, and how many there are
  Global<const int> gather;    // the rows in turn, or null
  int row, end;                // of the thread's first row of the slice that is asked for
  int next[Columns::ROWS];     // rows of the next slice; others than those that are there are zeros

  PTX_D void look_ahead() {
#pragma unroll
    for (int i = 0; i < Columns::ROWS; i++) {
      const int at = row + i * Columns::APART;
      next[i] = gather ? -1 : at;
      if (gather && at < end + BUG(box_gathered_tail)) next[i] = load_readonly(gather + at);
    }
    row += S::SLICE;
  }

 public:
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k, Place place) {
    columns.start(place);
    gather = rows.gather;
    count = gather ? rows.count : k;
    from = rows.base.template as<const uint8_t>() + columns.first;
    pitch = rows.pitch * sizeof(Element);
    row = Columns::row();
    end = k;
    look_ahead();
  }
  PTX_D void copy(Shared slice, Shared, bool) {
#pragma unroll
    for (int i = 0; i < Columns::ROWS; i++) {
      const bool exists = static_cast<uint32_t>(next[i]) < static_cast<uint32_t>(count);
      columns.copy_row(slice, i, from + static_cast<int64_t>(next[i]) * pitch, exists);
    }
    look_ahead();
  }
};

// Points nowhere: for the threads that multiply, which look at nothing but whether the right half of a tile is there.
template <int SIZE> struct NoBoxes {
  bool has_right = true;

  template <class Element, class Place> PTX_D void start(const Rows<Element>&, int, Place place) { has_right = place(SIZE / 2) >= 0; }
};

}  // namespace tile
