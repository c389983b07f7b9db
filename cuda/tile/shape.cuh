// The shape of a block's tile of a grouped product, and where an operand's elements lie in shared memory.
//
// C[m, n] = sum over k of A[m, k] B[n, k]. A block computes BM x BN of C, walking along K in slices of 64 bytes, STAGES
// of them in flight. A warp owns WM rows and 64 columns: one run of 32 columns in the left half of the tile and one in
// the right, so that a gate column and its up column can meet in the same thread.
#pragma once
#include <type_traits>

#include "ptx/ptx.cuh"

namespace tile {
using namespace ptx;

// What is multiplied: bf16 and f16 by tensor cores, float by fused multiply-add, tf32 is float rounded for tensor cores.
struct tf32 {};
template <class Math> using ElementOf = std::conditional_t<std::is_same_v<Math, tf32>, float, Math>;

// The direction in which an operand is contiguous in memory: along K, or along M (of A) and N (of B). ANY is either, and
// without alignment: copied element by element, and K-major in shared memory.
enum class Major { K, MN, ANY };

constexpr int RUN = 32;
constexpr int NI = 8;  // tiles of 8 columns of a warp, the first four in its left run
constexpr int SLICE_BYTES = 64, CHUNK_BYTES = 16;

struct Singly;  // walk.cuh

template <class Math_, int BM_, int BN_, int WM_, int STAGES_> struct Shape {
  using Math = Math_;
  using Element = ElementOf<Math>;
  using Teams = Singly;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, STAGES = STAGES_;
  static constexpr int SLICE = SLICE_BYTES / sizeof(Element), CHUNK = CHUNK_BYTES / sizeof(Element);
  static constexpr int WARPS_M = BM / WM, MI = WM / 16, THREADS = 32 * WARPS_M * (BN / (2 * RUN));
  static constexpr int A_BYTES = BM * SLICE_BYTES, STAGE_BYTES = A_BYTES + BN * SLICE_BYTES;
  static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
  // A thread's accumulators: c[i][j] is the fragment of rows 16i.. and columns 8j.. of the warp.
  using Sums = float[MI][NI][4];

  PTX_D static int lane() { return thread_id() % 32; }
  PTX_D static int warp_row() { return thread_id() / 32 % WARPS_M * WM; }
  // First column of the warp's left (0) or right (1) run.
  PTX_D static int run_column(int half) { return thread_id() / 32 / WARPS_M * RUN + half * (BN / 2); }
};

// Byte offset of a chunk of 16 bytes in a slice, swizzled so that neither copies nor reads of fragments meet in a bank.
// K-major: `row` is m or n, 4 chunks a row. MN-major: `row` is k, the chunks run along SIZE elements of m or n.
template <class Element, int SIZE, Major MAJOR> PTX_D uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
  if constexpr (MAJOR != Major::MN) return row * SLICE_BYTES + ((chunk ^ (row >> 1 & 3)) << 4);
  else if constexpr (sizeof(Element) == 2) return row * (SIZE * 2) + ((chunk ^ (row & 7)) << 4);
  else return row * (SIZE * 4) + ((chunk ^ (row & 3) << 1) << 4);
}

}  // namespace tile
