// Addresses in shared memory.
#pragma once
#include "emulator/scheduler.h"

namespace emulator {

// Where the dynamic shared memory of a block begins in its window; not 0, so that a forgotten base is an error. Windows of
// the blocks of a cluster lie as far apart as on a GPU.
constexpr uint32_t shared_base = 1024, shared_window = 1 << 24;

inline uint32_t shared_address(const Block& block) { return block.rank * shared_window + shared_base; }
inline uint32_t shared_offset(uint32_t address) { return address % shared_window - shared_base; }

// The memory at an address of that block's.
inline uint8_t* shared_at(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, const Where& where) {
  const uint32_t offset = address - shared_address(block), rank = address / shared_window;
  if (rank != static_cast<uint32_t>(block.rank) && rank < block.cluster.blocks.size())
    fail(where, "%s of %u bytes is out of bounds: shared byte %u of block %d, which only mbarrier_arrive_at and tma_load_pair reach", what,
         bytes, shared_offset(address), block.cluster.blocks[rank]->id);
  if (address < shared_address(block) || offset + bytes > block.shared_bytes || offset + bytes < offset)
    fail(where, "%s of %u bytes at shared byte %d is out of bounds: the block has %u", what, bytes, static_cast<int>(offset),
         block.shared_bytes);
  if (address % alignment) fail(where, "%s at shared byte %u is not aligned to %u", what, offset, alignment);
  return block.shared + offset;
}

// What lies in that block where `address` lies in the current thread's.
inline uint32_t same_place(uint32_t address, const Block& block, uint32_t bytes, uint32_t alignment, const char* what, const Where& where) {
  shared_at(*current->block, address, bytes, alignment, what, where);
  return shared_offset(address) + shared_address(block);
}

// Reads or writes of the current thread, checked and recorded.
inline const uint8_t* read_shared(uint32_t address, uint32_t bytes, const char* what, const Where& where) {
  Block& block = *current->block;
  const uint8_t* at = shared_at(block, address, bytes, bytes, what, where);
  if (settings.races) block.shadow.read(shared_offset(address), bytes, own_access(), current->warp->known, where);
  return at;
}
inline uint8_t* write_shared(uint32_t address, uint32_t bytes, bool atomic, const char* what, const Where& where) {
  Block& block = *current->block;
  uint8_t* at = shared_at(block, address, bytes, bytes, what, where);
  block.shared_version++;
  if (settings.races) block.shadow.write(shared_offset(address), bytes, own_access(atomic), current->warp->known, where);
  return at;
}

}  // namespace emulator
