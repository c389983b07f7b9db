// Matrix fragments from shared memory, and warp-wide products of 16x8 tiles.
//
// With g = lane / 4 and q = lane % 4 a lane holds, of a tile,
//   accumulator 16x8   c[0..1] = (g, 2q..2q+1), c[2..3] = (g + 8, 2q..2q+1)
//   16-bit A 16x16     a[0] = (g, 2q..), a[1] = (g + 8, 2q..), a[2] = (g, 2q + 8..), a[3] = (g + 8, 2q + 8..), pairs
//   16-bit B 16x8      b[0] = (2q.., g), b[1] = (2q + 8.., g), pairs along k
//   tf32 A 16x8        a[0] = (g, q), a[1] = (g + 8, q), a[2] = (g, q + 4), a[3] = (g + 8, q + 4)
//   tf32 B 8x8         b[0] = (q, g), b[1] = (q + 4, g)
#pragma once
#include "ptx/device/types.cuh"

namespace ptx {

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and receives elements
// (g, 2q..2q+1) of each.
PTX_D void ldmatrix_x4(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row.at) : "memory");
}
// The same, each matrix transposed: a lane receives (2q..2q+1, g).
PTX_D void ldmatrix_x4_trans(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row.at) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The other way: stores what ldmatrix_x4 loads.
PTX_D void stmatrix_x4(Shared row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(row.at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
PTX_D void stmatrix_x4_trans(Shared row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(row.at), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
#endif

template <class T> PTX_D void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define PTX_MMA(T, NAME)                                                                                            \
  template <> PTX_D void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                    \
    asm volatile("mma.sync.aligned." NAME " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                  \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
PTX_MMA(bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
PTX_MMA(f16, "m16n8k16.row.col.f32.f16.f16.f32")
PTX_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef PTX_MMA

// c[i][j] += a[i] * b[j] for a warp's whole tile; K = 16 for bf16 and f16, 8 for float (tf32 operands).
template <class T, int MI, int NI>
PTX_D void mma_tile(float (&c)[MI][NI][4], const uint32_t (&a)[MI][4], const uint32_t (&b)[NI][2]) {
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++) mma<T>(c[i][j], a[i], b[j]);
}

}  // namespace ptx
