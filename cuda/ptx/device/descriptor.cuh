// Descriptors of wgmma operands in 128-byte-swizzled shared memory; plain arithmetic, the same on the CPU.
#pragma once

namespace ptx {

// K-major: rows of 64 elements along K, 8 rows an atom, atoms 1024 bytes apart.
PTX_D uint64_t descriptor(Shared tile) {
  return static_cast<uint64_t>((tile.at & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
// MN-major: 64 elements along M or N a row, 8 deep an atom, atoms 1024 bytes apart along K and `stride` along M or N.
PTX_D uint64_t descriptor_transposed(Shared tile, uint32_t stride) {
  return static_cast<uint64_t>((tile.at & 0x3ffff) >> 4) | static_cast<uint64_t>(stride >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

}  // namespace ptx
