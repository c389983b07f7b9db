// From global memory to boxes in shared memory, by the threads of the first warpgroup. Thread t copies chunks of 16 bytes,
// the (t % 8)-th of rows t / 8, t / 8 + 16, ..., all with the same swizzle; what lies outside the matrix becomes zeros.
#pragma once
#include "tile/operand.cuh"
#include "tile/warpgroups.cuh"

namespace tile {

struct BoxChunk {
  static constexpr int APART = WARPGROUP / 8;  // rows from one of a thread's chunks to the next

  PTX_D static int row() { return thread_id() / 8; }
  template <class S> PTX_D static int column() { return thread_id() % 8 * S::CHUNK; }
  PTX_D static Shared to(Shared box) {
    const uint32_t chunk = BUG(box_swizzle) ? thread_id() % 8 : (thread_id() % 8) ^ (row() & 7);
    return box + (row() * BOX_ROW_BYTES + chunk * CHUNK_BYTES);
  }
};

// The copies of a thread, as Operand in operand.cuh. The places of either half of the tile follow each other in memory, as
// far as they are there. K-major, a box has the SIZE rows m or n of a slice; MN-major, SIZE / 64 boxes have its 64 rows k.
template <class S, int SIZE, Major MAJOR, bool GATHER> class Boxes;

template <class S, int SIZE> class Boxes<S, SIZE, Major::K, false> : BoxChunk {
  using Element = typename S::Element;
  static constexpr int COPIES = SIZE / APART;
  Global<const Element> from[2];  // the thread's first row of either half
  int64_t step;                   // elements between its rows
  uint32_t exists;
  int k, end;

 public:
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k_end, Place place) {
    k = column<S>();
    end = k_end;
    step = APART * rows.pitch;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int at = place(half * (SIZE / 2) + row());
      from[half] = rows.at(at < 0 ? 0 : at);
    }
    exists = 0;
#pragma unroll 1
    for (int i = 0; i < COPIES; i++) exists |= static_cast<uint32_t>(place(row() + i * APART) >= 0 || BUG(box_missing_row)) << i;
  }
  PTX_D void copy(Shared slice) {
    const uint32_t now = k < end + BUG(box_k_tail) * S::CHUNK ? exists : 0;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const Global<const Element> row = from[2 * i / COPIES] + (i % (COPIES / 2) * step + k);
      cp_async<CHUNK_BYTES>(to(slice) + i * APART * BOX_ROW_BYTES, row.template as<const void>(), now >> i & 1);
    }
    k += S::SLICE;
  }
};

template <class S, int SIZE> class Boxes<S, SIZE, Major::K, true> : BoxChunk {
  using Element = typename S::Element;
  static constexpr int COPIES = SIZE / APART;
  Rows<Element> rows;
  int found[COPIES];  // the rows, -1 where there is none
  int k, end;

 public:
  template <class Place> PTX_D void start(const Rows<Element>& all, int k_end, Place place) {
    k = column<S>();
    end = k_end;
    rows = all;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int at = place(row() + i * APART);
      found[i] = at < 0 ? -1 : BUG(box_not_gathered) ? at : rows.index(at);
    }
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const Global<const Element> from = rows.at(found[i] < 0 ? 0 : found[i]) + k;
      cp_async<CHUNK_BYTES>(to(slice) + i * APART * BOX_ROW_BYTES, from.template as<const void>(), found[i] >= 0 && k < end);
    }
    k += S::SLICE;
  }
};

// The boxes of an MN-major operand that exist, and where the columns of a thread's chunks begin in a row.
template <class S, int SIZE> struct BoxColumns : BoxChunk {
  static constexpr int BOXES = SIZE / BOX, ROWS = S::SLICE / APART;
  int first[2];
  uint32_t exists;

  template <class Place> PTX_D void start(Place place) {
#pragma unroll
    for (int half = 0; half < 2; half++) first[half] = place(half * (SIZE / 2) + column<S>());
    exists = 0;
#pragma unroll 1
    for (int box = 0; box < BOXES; box++)
      exists |= static_cast<uint32_t>(place(box * BOX + column<S>()) >= 0 || BUG(box_missing_column)) << box;
  }
  // Copies the thread's chunks of its i-th row, which exists or not.
  template <class Element> PTX_D void copy_row(Shared slice, int i, Global<const Element> row, bool there) const {
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
      const Global<const Element> from = row + (first[2 * box / BOXES] + box % (BOXES / 2) * BOX);
      cp_async<CHUNK_BYTES>(to(slice) + (box * S::SLICE + i * APART) * BOX_ROW_BYTES, from.template as<const void>(), there && (exists >> box & 1));
    }
  }
};

template <class S, int SIZE> class Boxes<S, SIZE, Major::MN, false> {
  using Element = typename S::Element;
  using Columns = BoxColumns<S, SIZE>;
  Columns columns;
  Global<const Element> from;  // the thread's first row of the slice
  int64_t pitch;
  int left;                    // rows from there to the end

 public:
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k, Place place) {
    columns.start(place);
    pitch = rows.pitch;
    from = rows.at(Columns::row());
    left = k - Columns::row();
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < Columns::ROWS; i++)
      columns.copy_row(slice, i, from + i * Columns::APART * pitch, i * Columns::APART < left + BUG(box_rows_tail));
    from = from + S::SLICE * pitch;
    left -= S::SLICE;
  }
};

// Rows that may be gathered, by indices that are asked for one slice ahead.
template <class S, int SIZE> class Boxes<S, SIZE, Major::MN, true> {
  using Element = typename S::Element;
  using Columns = BoxColumns<S, SIZE>;
  Columns columns;
  Rows<Element> rows;
  int row, end;             // of the thread's first row of the slice that is asked for
  int next[Columns::ROWS];  // rows of the next slice, -1 where there is none

  PTX_D void look_ahead() {
#pragma unroll
    for (int i = 0; i < Columns::ROWS; i++) {
      const int at = row + i * Columns::APART;
      next[i] = at < end + BUG(box_gathered_tail) ? rows.index(at) : -1;
    }
    row += S::SLICE;
  }

 public:
  template <class Place> PTX_D void start(const Rows<Element>& all, int k, Place place) {
    columns.start(place);
    rows = all;
    row = Columns::row();
    end = k;
    look_ahead();
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < Columns::ROWS; i++) columns.copy_row(slice, i, rows.at(next[i] < 0 ? 0 : next[i]), next[i] >= 0);
    look_ahead();
  }
};

// Points nowhere: for the threads that multiply.
struct NoBoxes {
  template <class Element, class Place> PTX_D void start(const Rows<Element>&, int, Place) {}
};

}  // namespace tile
