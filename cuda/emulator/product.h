// The arithmetic of matrix instructions, on plain arrays.
#pragma once

namespace emulator {

// c += a * b for c [m][n], a [m][k], b [k][n], row by row; m is a multiple of 4, n of 8. Each element takes its k
// products in ascending order, every one exact and added with one rounding. A tensor core adds in an order and with a
// truncation of its own, so tests must not depend on either.
void multiply(float* c, int c_stride, const float* a, int a_stride, const float* b, int b_stride, int m, int n, int k);

}  // namespace emulator
