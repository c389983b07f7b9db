// From global memory to a slice in shared memory. Each thread copies chunks of 16 bytes at fixed places of the slice;
// what lies outside the matrix becomes zeros.
#pragma once
#include "tile/shape.cuh"

namespace tile {

// Rows of a matrix in memory; where `gather` is given, row r is row gather[r] of the `count` of `base`, and zeros where that
// is -1, or anything else that is none of them.
template <class Element> struct Rows {
  Global<const Element> base;
  Global<const int> gather;
  int64_t pitch;
  int count;
  int first = 0, matrix = 0;  // where `base` lies in a tensor: at this row of this one of its matrices

  PTX_D int index(int row) const {
    if (!gather) return row;
    const int at = load_readonly(gather + row);
    return static_cast<uint32_t>(at) < static_cast<uint32_t>(count) || BUG(operand_any_token) ? at : -1;
  }
  PTX_D Global<const Element> at(int index) const {
    return base + (BUG(operand_narrow_rows) ? static_cast<uint32_t>(index * pitch) : index * pitch);
  }
  // The rows from `first` on.
  PTX_D Rows from(int first) const {
    if (gather) return {base, gather + first, pitch, count};
    return {at(first), gather, pitch, count, first};
  }
};

// An expert's matrix as an operand along N: `all` is [E, columns, k], transposed [E, k, columns].
template <class Element>
PTX_D Rows<Element> expert_matrix(Global<const Element> all, int expert, int columns, int k, bool transposed) {
  const int64_t first = static_cast<int64_t>(BUG(operand_first_expert) ? 0 : expert) * columns * k;
  return {all + (BUG(operand_narrow_weights) ? static_cast<uint32_t>(first) : first), {nullptr}, transposed ? columns : k, 0, 0, expert};
}

// The copies of a thread of an operand that extends SIZE along m or n, all with the same swizzle.
//
// start(rows, k, place): the tile's index i along m or n is index place(i) in memory, anything where that is negative, and
// K has k elements. K-major, rows in memory run along K; MN-major, there is one for each k. GATHER: rows may be gathered.
// copy(slice) begins to copy the next slice. The constructor's flag is for ANY: whether there is a row for each k.
template <class S, int SIZE, Major MAJOR, bool GATHER> class Operand;

template <class S, int SIZE, bool GATHER> class Operand<S, SIZE, Major::K, GATHER> {
  using Element = typename S::Element;
  static constexpr int APART = S::THREADS / 4, COPIES = SIZE / APART;
  static_assert(APART % 8 == 0 && SIZE % APART == 0);
  Global<const Element> from[COPIES];
  uint32_t exists = ~0u;
  int k, end;

 public:
  explicit PTX_D Operand(bool) {}
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k_end, Place place) {
    k = thread_id() % 4 * S::CHUNK;
    end = k_end;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      const int at = place(thread_id() / 4 + i * APART);
      int row = at < 0 ? 0 : at;
      if constexpr (GATHER) {
        row = at < 0 ? -1 : BUG(operand_not_gathered) ? at : rows.index(at);
        exists = (exists & ~(1u << i)) | static_cast<uint32_t>(row >= 0 || BUG(operand_missing_row)) << i;
      }
      from[i] = rows.at(row < 0 ? 0 : row);
    }
  }
  PTX_D void copy(Shared slice) {
    const Shared to = slice + chunk_offset<Element, SIZE, Major::K>(thread_id() / 4, thread_id() % 4);
    const bool inside = k < end + BUG(operand_k_tail) * S::CHUNK;
    const uint32_t now = inside ? exists : 0;
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      cp_async<CHUNK_BYTES>(to + i * APART * SLICE_BYTES, (from[i] + k).template as<const void>(), GATHER ? now >> i & 1 : inside);
    k += S::SLICE;
  }
};

template <class S, int SIZE> struct AlongMN {
  using Element = typename S::Element;
  static constexpr int CHUNKS = SIZE / S::CHUNK, APART = S::THREADS / CHUNKS, COPIES = S::SLICE / APART;
  static_assert(APART % (sizeof(Element) == 2 ? 8 : 4) == 0 && S::SLICE % APART == 0);

  PTX_D static int column() { return thread_id() % CHUNKS * S::CHUNK; }
  PTX_D static int row() { return thread_id() / CHUNKS; }
  PTX_D static Shared to(Shared slice, int i) {
    return slice + chunk_offset<Element, SIZE, Major::MN>(row(), thread_id() % CHUNKS) + i * APART * SIZE * sizeof(Element);
  }
};

template <class S, int SIZE> class Operand<S, SIZE, Major::MN, false> : AlongMN<S, SIZE> {
  using Element = typename S::Element;
  using Along = AlongMN<S, SIZE>;
  Global<const uint8_t> from;  // the thread's first row of the slice
  int pitch_bytes, left;       // rows from there to the end

 public:
  explicit PTX_D Operand(bool) {}
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k, Place place) {
    const int column = place(Along::column());
    pitch_bytes = rows.pitch * sizeof(Element);
    left = column < 0 ? 0 : k - Along::row();
    from = (rows.at(Along::row()) + (column < 0 ? 0 : column)).template as<const uint8_t>();
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < Along::COPIES; i++) {
      const Global<const uint8_t> row = from + static_cast<int64_t>(i * Along::APART) * pitch_bytes;
      cp_async<CHUNK_BYTES>(Along::to(slice, i), row.template as<const void>(), i * Along::APART < left + BUG(operand_rows_tail));
    }
    from = from + static_cast<int64_t>(S::SLICE) * pitch_bytes;
    left -= S::SLICE;
  }
};

template <class S, int SIZE> class Operand<S, SIZE, Major::MN, true> : AlongMN<S, SIZE> {
  using Element = typename S::Element;
  using Along = AlongMN<S, SIZE>;
  // Not gathered, `from` is the thread's first row of the slice, and moves on with it.
  Global<const uint8_t> from;
  Global<const int> gather;  // of the thread's first row of the slice that is asked for
  int pitch_bytes;
  int count;                 // rows from `from` on
  int left;                  // rows from `gather` on
  int step;                  // of `gather` from slice to slice, 0 if there is none
  int next[Along::COPIES];   // rows of the next slice, counted from `from`, asked for one slice ahead; others are outside

  PTX_D void look_ahead() {
#pragma unroll
    for (int i = 0; i < Along::COPIES; i++) {
      next[i] = i * Along::APART - step;
      if (i * Along::APART < left + BUG(operand_gathered_tail)) next[i] = load_readonly(gather + i * Along::APART);
    }
    if (BUG(operand_same_rows)) return;
    gather = gather + step;
    left -= S::SLICE;
  }

 public:
  explicit PTX_D Operand(bool) {}
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k, Place place) {
    const int column = place(Along::column()), end = column < 0 ? 0 : k - Along::row();
    const bool gathered = static_cast<bool>(rows.gather);
    pitch_bytes = rows.pitch * sizeof(Element);
    from = (rows.at(gathered ? 0 : Along::row()) + (column < 0 ? 0 : column)).template as<const uint8_t>();
    gather = rows.gather + (gathered ? Along::row() : 0);
    step = gathered ? S::SLICE : 0;
    left = gathered ? end : 0;
    count = gathered ? rows.count : end < 0 ? 0 : end;
    look_ahead();
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < Along::COPIES; i++) {
      const Global<const uint8_t> row = from + static_cast<int64_t>(next[i]) * pitch_bytes;
      const bool exists = static_cast<uint32_t>(next[i]) < static_cast<uint32_t>(count);
      cp_async<CHUNK_BYTES>(Along::to(slice, i), row.template as<const void>(), exists);
    }
    const int plain = S::SLICE - step;
    from = from + static_cast<int64_t>(plain) * pitch_bytes;
    count = count > plain ? count - plain : 0;
    look_ahead();
  }
};

template <class S, int SIZE, bool GATHER> class Operand<S, SIZE, Major::ANY, GATHER> {
  using Element = typename S::Element;
  static constexpr int APART = S::THREADS / 4, COPIES = SIZE / APART;
  Rows<Element> rows;
  bool along_k;
  int place_[COPIES], k, end;

  PTX_D Element element(int place, int k) const {
    if (place < 0 || (k >= end && !BUG(operand_any_tail))) return {};
    const int row = along_k ? rows.index(k) : place;
    return row < 0 ? Element{} : load_readonly(rows.at(row) + (along_k ? place : k));
  }

 public:
  explicit PTX_D Operand(bool along_k) : along_k(along_k) {}
  template <class Place> PTX_D void start(const Rows<Element>& all, int k_end, Place place) {
    rows = all;
    k = thread_id() % 4 * S::CHUNK;
    end = k_end;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      place_[i] = place(thread_id() / 4 + i * APART);
      if (!along_k && place_[i] >= 0) place_[i] = rows.index(place_[i]);
    }
  }
  PTX_D void copy(Shared slice) {
    const Shared to = slice + chunk_offset<Element, SIZE, Major::ANY>(thread_id() / 4, thread_id() % 4);
#pragma unroll
    for (int i = 0; i < COPIES; i++)
#pragma unroll
      for (int e = 0; e < S::CHUNK; e++)
        store_shared(to + (i * APART * SLICE_BYTES + e * sizeof(Element)), element(place_[i], k + e));
    k += S::SLICE;
  }
};

}  // namespace tile
