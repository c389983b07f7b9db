// Copies of boxes by the tensor memory accelerator.
#pragma once
#include <cstdint>
#include <vector>

#include "emulator/failure.h"

namespace emulator {

// A three-dimensional tensor and the box, one matrix deep, that a copy takes; as large as CUDA's CUtensorMap.
struct alignas(64) TensorMap {
  uint64_t base;                           // address
  uint64_t width, height, depth;           // elements of a row, rows of a matrix, matrices
  uint64_t row_bytes, matrix_bytes;        // from one to the next
  uint32_t box_width, box_height, element_bytes;
  uint32_t swizzled;                       // 128-byte swizzle
  uint64_t mark, unused[7];
};
static_assert(sizeof(TensorMap) == 128);

// Refuses what cuTensorMapEncodeTiled refuses: throws Failure.
TensorMap make_tensor_map(const void* base, uint32_t element_bytes, uint64_t width, uint64_t height, uint64_t depth, uint64_t row_bytes,
                          uint64_t matrix_bytes, uint32_t box_width, uint32_t box_height, bool swizzled);

// The bulk groups of one thread's stores, with the stamps of those not waited for.
struct StoreGroups {
  struct Store { int group; uint32_t stamp; };
  std::vector<Store> stores;
  int group = 0;
};

// The first element of a box.
struct Corner { int x, y, z; };

void tensor_load(uint32_t to, const TensorMap* map, uint32_t barrier, Corner corner, const Where& where);
// To the same place in both blocks of the cluster.
void tensor_load_pair(uint32_t to, const TensorMap* map, uint32_t barrier, Corner corner, const Where& where);
void tensor_store(const TensorMap* map, uint32_t from, Corner corner, const Where& where);
void commit_stores();
void wait_stores(int newest_left);

// The address where the 128-byte swizzle puts what belongs at `address`.
inline uint32_t swizzle128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace emulator
