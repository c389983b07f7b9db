#include "emulator/tma.h"

#include <algorithm>
#include <cstring>
#include <span>

#include "emulator/mbarrier.h"
#include "emulator/memory.h"
#include "emulator/scheduler.h"
#include "emulator/shared.h"

namespace emulator {
namespace {

constexpr uint64_t valid_mark = 0x7e2507a9;

// Calls visit(global address, shared address, bytes, inside) for the 16-byte pieces of a box; the piece of a row that
// crosses the tensor's far end is visited in two parts.
template <class Visit> void pieces(const TensorMap& map, uint32_t shared, Corner corner, Visit&& visit) {
  const int64_t row_bytes = int64_t{map.box_width} * map.element_bytes, left = int64_t{corner.x} * map.element_bytes;
  const int64_t width = static_cast<int64_t>(map.width * map.element_bytes);
  const bool matrix_inside = corner.z < static_cast<int64_t>(map.depth);
  const uint64_t matrix = map.base + static_cast<uint64_t>(int64_t{corner.z}) * map.matrix_bytes;
  for (int64_t row = 0; row < map.box_height; row++) {
    const int64_t y = corner.y + row;
    const bool row_inside = matrix_inside && y < static_cast<int64_t>(map.height);
    for (int64_t at = 0; at < row_bytes; at += 16) {
      uint32_t to = shared + static_cast<uint32_t>(row * row_bytes + at);
      if (map.swizzled) to = swizzle128(to);
      const auto part = [&](int64_t begin, int64_t end, bool inside) {  // columns, in bytes
        if (begin < end)
          visit(matrix + static_cast<uint64_t>(y) * map.row_bytes + begin, to + static_cast<uint32_t>(begin - left - at),
                static_cast<uint32_t>(end - begin), inside && row_inside);
      };
      const int64_t begin = left + at, end = begin + 16, last = std::clamp(width, begin, end);
      part(begin, last, true);
      part(last, end, false);
    }
  }
}

// check(address, bytes) for aligned powers of two.
template <class Check> void aligned_parts(uint64_t address, uint32_t bytes, Check&& check) {
  while (bytes) {
    uint32_t part = 16;
    while (address % part || part > bytes) part /= 2;
    check(reinterpret_cast<const void*>(address), part);
    address += part;
    bytes -= part;
  }
}

uint32_t box_bytes(const TensorMap& map) { return map.box_width * map.box_height * map.element_bytes; }

void check_box(const TensorMap* map, uint32_t shared, Corner corner, const char* what, const Where& where) {
  if (reinterpret_cast<uintptr_t>(map) % 64) fail(where, "%s: the tensor map is not aligned to 64 bytes", what);
  if (map->mark != valid_mark) fail(where, "%s: that is no tensor map", what);
  const auto [x, y, z] = corner;
  if (x < 0 || y < 0 || z < 0) fail(where, "%s at (%d, %d, %d): a coordinate is negative", what, x, y, z);
  if (int64_t{x} * map->element_bytes % 16)
    fail(where, "%s at (%d, %d, %d): x is no multiple of 16 bytes, of elements of %u", what, x, y, z, map->element_bytes);
  shared_at(*current->block, shared, box_bytes(*map), map->swizzled ? 1024 : 128, what, where);
}

}  // namespace

TensorMap make_tensor_map(const void* base, uint32_t element_bytes, uint64_t width, uint64_t height, uint64_t depth, uint64_t row_bytes,
                          uint64_t matrix_bytes, uint32_t box_width, uint32_t box_height, bool swizzled) {
  const auto wants = [](bool holds, const char* what) {
    if (!holds) throw Failure(std::string("tensor map: ") + what);
  };
  wants(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the base must be aligned to 16 bytes");
  for (uint64_t stride : {row_bytes, matrix_bytes})
    wants(stride % 16 == 0 && stride < uint64_t{1} << 40, "strides must be multiples of 16 bytes below 2^40");
  wants(element_bytes == 1 || element_bytes == 2 || element_bytes == 4 || element_bytes == 8, "elements must be of 1, 2, 4 or 8 bytes");
  for (uint64_t size : {width, height, depth}) wants(size && size <= uint64_t{1} << 32, "sizes must be from 1 to 2^32");
  wants(box_width && box_height && box_width <= 256 && box_height <= 256, "sides of the box must be from 1 to 256");
  wants(box_width * element_bytes % 16 == 0, "a row of the box must be a multiple of 16 bytes");
  wants(!swizzled || box_width * element_bytes <= 128, "a row of a swizzled box must be at most 128 bytes");
  return {reinterpret_cast<uint64_t>(base), width, height, depth, row_bytes, matrix_bytes, box_width, box_height, element_bytes, swizzled,
          valid_mark, {}};
}

// `to` and `barrier_address` are those of the current block, which gets the box, or with it all blocks of its cluster.
static void load(const char* what, std::span<const std::unique_ptr<Block>> blocks, uint32_t to, const TensorMap* map, uint32_t barrier_address,
                 Corner corner, const Where& where) {
  preempt();
  Cluster& cluster = *current->cluster;
  Warp& warp = *current->warp;
  check_box(map, to, corner, what, where);
  pieces(*map, to, corner, [&](uint64_t from, uint32_t, uint32_t bytes, bool inside) {
    if (inside) aligned_parts(from, bytes, [&](const void* p, uint32_t n) { check_load_readonly(p, n, what, where); });
  });
  const int agent = cluster.async_agent(warp);
  const uint32_t stamp = ++warp.issued;
  for (const auto& block : blocks) {
    reach(*block, agent, stamp, what, where);
    const uint32_t target = same_place(to, *block, box_bytes(*map), 128, what, where);
    MBarrier& barrier = mbarrier_at(*block, same_place(barrier_address, *block, 8, 8, what, where), where);
    if (!barrier.fenced) fail(where, "%s: no fence_mbarrier_init after the mbarrier's initialisation", what);
    if (settings.races)
      block->shadow.write(shared_offset(target), box_bytes(*map),
                          {agent, stamp, warp.id, static_cast<uint8_t>(current->lane), warp.epoch, false, false}, warp.known, where);
    Knowledge known = warp.known;
    known.seen.of[agent] = stamp;
    enqueue({.run = [&block = *block, &barrier, map = *map, target, corner, known, where] {
               block.shared_version++;
               pieces(map, target, corner, [&](uint64_t from, uint32_t at, uint32_t bytes, bool inside) {
                 uint8_t* copied = block.shared + shared_offset(at);
                 if (inside) memcpy(copied, reinterpret_cast<const void*>(from), bytes);
                 else memset(copied, 0, bytes);
               });
               complete_bytes(block, barrier, box_bytes(map), known, where);
             },
             .block = block.get(), .where = where});
  }
}

void tensor_load(uint32_t to, const TensorMap* map, uint32_t barrier, Corner corner, const Where& where) {
  load("tma_load", {&current->cluster->blocks[current->block->rank], 1}, to, map, barrier, corner, where);
}

void tensor_load_pair(uint32_t to, const TensorMap* map, uint32_t barrier, Corner corner, const Where& where) {
  const auto& blocks = current->cluster->blocks;
  if (blocks.size() != 2) fail(where, "tma_load_pair in a kernel whose clusters have one block");
  load("tma_load_pair", blocks, to, map, barrier, corner, where);
}

void tensor_store(const TensorMap* map, uint32_t from, Corner corner, const Where& where) {
  preempt();
  Block& block = *current->block;
  Warp& warp = *current->warp;
  check_box(map, from, corner, "tma_store", where);
  const uint32_t stamp = ++warp.issued;
  if (settings.races) {
    for (uint32_t at = 0; at < box_bytes(*map); at += 16) block.shadow.check_fenced(shared_offset(from) + at, warp.known, where);
    block.shadow.read(shared_offset(from), box_bytes(*map),
                      {block.cluster.async_agent(warp), stamp, warp.id, static_cast<uint8_t>(current->lane), warp.epoch}, warp.known, where);
  }
  pieces(*map, from, corner, [&](uint64_t to, uint32_t, uint32_t bytes, bool inside) {
    if (inside) aligned_parts(to, bytes, [&](const void* p, uint32_t n) { check_store(p, n, "tma_store", where); });
  });
  current->stores.stores.push_back({current->stores.group, stamp});
  enqueue({.run = [&block, map = *map, from, corner] {
             pieces(map, from, corner, [&](uint64_t to, uint32_t at, uint32_t bytes, bool inside) {
               if (inside) memcpy(reinterpret_cast<void*>(to), block.shared + shared_offset(at), bytes);
             });
           },
           .block = &block, .storer = current, .group = current->stores.group, .where = where});
}

void commit_stores() { current->stores.group++; }

void wait_stores(int newest_left) {
  Cluster& cluster = *current->cluster;
  const int end = current->stores.group - newest_left;
  for (size_t i = 0; i < cluster.pending.size();)
    if (cluster.pending[i].storer == current && cluster.pending[i].group < end) run_pending(cluster, i);
    else i++;
  uint32_t& seen = current->warp->known.seen.of[cluster.async_agent(*current->warp)];
  for (const auto& store : current->stores.stores)
    if (store.group < end) seen = std::max(seen, store.stamp);
  std::erase_if(current->stores.stores, [&](const auto& store) { return store.group < end; });
}

}  // namespace emulator
