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

  PTX_D int index(int row) const {
    if (!gather) return row;
    const int at = load_readonly(gather + row);
    return static_cast<uint32_t>(at) < static_cast<uint32_t>(count) ? at : -1;
  }
  PTX_D Global<const Element> at(int index) const { return base + index * pitch; }
  // The rows from `first` on.
  PTX_D Rows from(int first) const {
    if (gather) return {base, gather + first, pitch, count};
    return {at(first), gather, pitch, count};
  }
};

// An expert's matrix as an operand along N: `all` is [E, columns, k], transposed [E, k, columns].
template <class Element>
PTX_D Rows<Element> expert_matrix(Global<const Element> all, int expert, int columns, int k, bool transposed) {
  return {all + static_cast<int64_t>(expert) * columns * k, {nullptr}, transposed ? columns : k, 0};
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
        row = at < 0 ? -1 : rows.index(at);
        exists = (exists & ~(1u << i)) | static_cast<uint32_t>(row >= 0) << i;
      }
      from[i] = rows.at(row < 0 ? 0 : row);
    }
  }
  PTX_D void copy(Shared slice) {
    const Shared to = slice + chunk_offset<Element, SIZE, Major::K>(thread_id() / 4, thread_id() % 4);
    const uint32_t now = k < end ? exists : 0;
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      cp_async<CHUNK_BYTES>(to + i * APART * SLICE_BYTES, (from[i] + k).template as<const void>(), GATHER ? now >> i & 1 : k < end);
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
  Global<const uint8_t> from;
  int pitch_bytes, row, end;

 public:
  explicit PTX_D Operand(bool) {}
  template <class Place> PTX_D void start(const Rows<Element>& rows, int k, Place place) {
    const int column = place(Along::column());
    pitch_bytes = rows.pitch * sizeof(Element);
    row = Along::row();
    end = column < 0 ? 0 : k;
    from = (rows.base + (column < 0 ? 0 : column)).template as<const uint8_t>();
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < Along::COPIES; i++) {
      const int at = row + i * Along::APART;
      cp_async<CHUNK_BYTES>(Along::to(slice, i), (from + static_cast<int64_t>(at) * pitch_bytes).template as<const void>(), at < end);
    }
    row += S::SLICE;
  }
};

template <class S, int SIZE> class Operand<S, SIZE, Major::MN, true> : AlongMN<S, SIZE> {
  using Element = typename S::Element;
  using Along = AlongMN<S, SIZE>;
  Rows<Element> rows;
  int next[Along::COPIES];  // rows of the next slice, asked for one slice ahead
  int row, end;

  PTX_D void look_ahead() {
#pragma unroll
    for (int i = 0; i < Along::COPIES; i++) next[i] = row + i * Along::APART < end ? rows.index(row + i * Along::APART) : -1;
    row += S::SLICE;
  }

 public:
  explicit PTX_D Operand(bool) {}
  template <class Place> PTX_D void start(const Rows<Element>& all, int k, Place place) {
    const int column = place(Along::column());
    rows = all;
    rows.base = rows.base + (column < 0 ? 0 : column);
    row = Along::row();
    end = column < 0 ? 0 : k;
    look_ahead();
  }
  PTX_D void copy(Shared slice) {
#pragma unroll
    for (int i = 0; i < Along::COPIES; i++)
      cp_async<CHUNK_BYTES>(Along::to(slice, i), rows.at(next[i] < 0 ? 0 : next[i]).template as<const void>(), next[i] >= 0);
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
    if (place < 0 || k >= end) return {};
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
