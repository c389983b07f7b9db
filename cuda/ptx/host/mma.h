// device/mma.cuh on the CPU.
#pragma once
#include "emulator/collective.h"
#include "emulator/product.h"
#include "ptx/host/math.h"
#include "ptx/host/memory.h"

namespace ptx {

template <class Register> struct RowRequest { Register (&r)[4]; uint32_t row; };

// Calls copy(lane's registers, matrix, row, the row's 16 bytes) for each of the 32 rows. The lanes write where they do not
// get anything.
template <class Register, class Copy> void move_matrices(const char* what, Register (&r)[4], Shared at, const Where& where, Copy&& copy) {
  constexpr bool stores = std::is_const_v<Register>;
  RowRequest<Register> request{r, at.at};
  emulator::together(what, request, where, [&](RowRequest<Register>** lanes) {
    emulator::Block& block = *emulator::current->block;
    const emulator::Warp& warp = *emulator::current->warp;
    for (int lane = 0; lane < 32; lane++) {
      uint8_t* row = emulator::shared_at(block, lanes[lane]->row, 16, 16, what, where);
      const uint32_t offset = emulator::shared_offset(lanes[lane]->row);
      const emulator::Access access{warp.id, warp.known.seen.of[warp.id], warp.id, static_cast<uint8_t>(lane), warp.epoch};
      if (emulator::settings.races && stores) block.shadow.write(offset, 16, access, warp.known, where);
      else if (emulator::settings.races) block.shadow.read(offset, 16, access, warp.known, where);
      copy(lanes, lane / 8, lane % 8, row);
    }
    if (stores) block.shared_version++;
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], Shared row, Where where = Where::current()) {
  move_matrices("ldmatrix_x4", r, row, where, [](auto lanes, int matrix, int i, const uint8_t* row) {
    for (int q = 0; q < 4; q++) memcpy(&lanes[i * 4 + q]->r[matrix], row + q * 4, 4);
  });
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], Shared row, Where where = Where::current()) {
  move_matrices("ldmatrix_x4_trans", r, row, where, [](auto lanes, int matrix, int i, const uint8_t* row) {
    for (int g = 0; g < 8; g++) memcpy(reinterpret_cast<uint8_t*>(&lanes[g * 4 + i / 2]->r[matrix]) + i % 2 * 2, row + g * 2, 2);
  });
}
inline void stmatrix_x4_trans(Shared row, const uint32_t (&r)[4], Where where = Where::current()) {
  move_matrices("stmatrix_x4_trans", r, row, where, [](auto lanes, int matrix, int i, uint8_t* row) {
    for (int g = 0; g < 8; g++) memcpy(row + g * 2, reinterpret_cast<const uint8_t*>(&lanes[g * 4 + i / 2]->r[matrix]) + i % 2 * 2, 2);
  });
}
inline void stmatrix_x4(Shared row, const uint32_t (&r)[4], Where where = Where::current()) {
  move_matrices("stmatrix_x4", r, row, where, [](auto lanes, int matrix, int i, uint8_t* row) {
    for (int q = 0; q < 4; q++) memcpy(row + q * 4, &lanes[i * 4 + q]->r[matrix], 4);
  });
}

// What the lanes give to a product of MI x NI tiles; c is [MI][NI][4], a [MI][4], b [NI][2].
struct TileArgument { float* c; const uint32_t* a; const uint32_t* b; };

template <class T, int MI, int NI> void multiply_tile(TileArgument** lanes) {
  constexpr int K = sizeof(T) == 2 ? 16 : 8, M = MI * 16, N = NI * 8;
  __attribute__((uninitialized)) alignas(32) float a[M][K];
  __attribute__((uninitialized)) alignas(32) float b[K][N];
  __attribute__((uninitialized)) alignas(32) float c[M][N];
  // Element pairs (16 bits) or single elements (tf32) of the register at the given place of an operand.
  const auto put = [](uint32_t value, float* first, ptrdiff_t second) {
    if constexpr (sizeof(T) == 2) {
      first[0] = low_half<T>(value);
      first[second] = high_half<T>(value);
    } else {
      first[0] = bits_float(value & 0xffffe000);
    }
  };
  constexpr int wide = sizeof(T) == 2 ? 2 : 1, half = K / 2;
  for (int lane = 0; lane < 32; lane++) {
    const TileArgument& x = *lanes[lane];
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < MI; i++)
      for (int r = 0; r < 4; r++) put(x.a[i * 4 + r], &a[i * 16 + g + r % 2 * 8][q * wide + r / 2 * half], 1);
    for (int j = 0; j < NI; j++)
      for (int r = 0; r < 2; r++) put(x.b[j * 2 + r], &b[q * wide + r * half][j * 8 + g], N);
  }
  const auto accumulators = [&](auto&& move) {
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < MI; i++)
        for (int j = 0; j < NI; j++)
          for (int h = 0; h < 2; h++)
            move(lanes[lane]->c + (i * NI + j) * 4 + h * 2, &c[i * 16 + lane / 4 + h * 8][j * 8 + lane % 4 * 2]);
  };
  accumulators([](const float* registers, float* tile) { memcpy(tile, registers, 8); });
  emulator::multiply(&c[0][0], N, &a[0][0], K, &b[0][0], N, M, N, K);
  accumulators([](float* registers, const float* tile) { memcpy(registers, tile, 8); });
}

template <class T, int MI, int NI>
void mma_tile(float (&c)[MI][NI][4], const uint32_t (&a)[MI][4], const uint32_t (&b)[NI][2], Where where = Where::current()) {
  TileArgument argument{&c[0][0][0], &a[0][0], &b[0][0]};
  emulator::together("mma_tile", argument, where, multiply_tile<T, MI, NI>);
}
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  TileArgument argument{c, a, b};
  emulator::together("mma", argument, where, multiply_tile<T, 1, 1>);
}

}  // namespace ptx
