#include "emulator/product.h"

namespace emulator {
namespace {

typedef float Vector __attribute__((vector_size(32), aligned(4)));

// Four rows by 8 * VECTORS columns, in registers.
template <int VECTORS>
void multiply_strip(float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride, int k) {
  Vector sum[4][VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) sum[i][j] = *reinterpret_cast<Vector*>(c + i * c_stride + j * 8);
  for (int p = 0; p < k; p++) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; j++) sum[i][j] += a[i * a_stride + p] * *reinterpret_cast<const Vector*>(b + p * b_stride + j * 8);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; j++) *reinterpret_cast<Vector*>(c + i * c_stride + j * 8) = sum[i][j];
}

}  // namespace

void multiply(float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride, int m, int n, int k) {
  int j = 0;
  for (; j + 16 <= n; j += 16)
    for (int i = 0; i < m; i += 4) multiply_strip<2>(c + i * c_stride + j, c_stride, a + i * a_stride, a_stride, b + j, b_stride, k);
  for (; j < n; j += 8)
    for (int i = 0; i < m; i += 4) multiply_strip<1>(c + i * c_stride + j, c_stride, a + i * a_stride, a_stride, b + j, b_stride, k);
}

}  // namespace emulator
