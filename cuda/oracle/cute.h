// Where the elements of matrices lie, by the layout algebra of NVIDIA's CuTe (headers of CUTLASS): it knows nothing of
// this project, so it can tell whether cuda/ptx and the emulator are right.
#pragma once
#include <cstdint>

namespace oracle {

// Of mma.sync: lane and value of a fragment to an index m + 16 k of A, n + 8 k of B, m + 16 n of the accumulator.
struct Fragments { int (*a)(int lane, int value), (*b)(int lane, int value), (*c)(int lane, int value); };
extern const Fragments bf16_16x8x16, f16_16x8x16, tf32_16x8x8;

// Of ldmatrix x4, plain or transposed: which of the 8 elements of which lane's row, 8 * lane + element, becomes the
// `value`-th of the 8 elements that a lane receives.
int matrix_element(bool transposed, int lane, int value);

// Of wgmma with 64 rows and 64, 128 or 256 columns: thread and value of the accumulator to m + 64 n.
int accumulator(int columns, int thread, int value);

// A tile of `rows` (64, 128 or 256) along M or N by 64 along K of 16-bit elements, in 128-byte swizzled shared memory.
uint32_t tile_byte(bool mn_major, int rows, int row, int k);
// The descriptor of its step-th part of 16 along K; the tile lies at address 0.
uint64_t descriptor(bool mn_major, int rows, int step);

}  // namespace oracle
