// Products of 64 rows by N columns and 16 deep, by a warpgroup, from shared memory into registers (sm_90).
//
// Operands are 128-byte-swizzled tiles, described by descriptor(). Thread t of the warpgroup holds, of the 64xN
// accumulator, d[4j + 2h + i] = (16 (t / 32) + t % 32 / 4 + 8h, 8j + 2 (t % 4) + i).
#pragma once
#include "ptx/device/types.cuh"
#include "ptx/device/descriptor.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace ptx {

// Before the first product, and after registers of an accumulator were written.
PTX_D void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_D void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> PTX_D void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d = a * b, plus d where `accumulate`; TA and TB say that A or B is MN-major.
template <class T, bool TA, bool TB, int REGISTERS>
PTX_D void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, bool accumulate);

#define PTX_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PTX_D32(i) PTX_D8(i), PTX_D8(i + 8), PTX_D8(i + 16), PTX_D8(i + 24)
#define PTX_WGMMA_64(T, NAME, TA, TB)                                                                         \
  template <> PTX_D void wgmma<T, TA, TB, 32>(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {"                                  \
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
                 "}, %32, %33, p, 1, 1, %35, %36;\n}"                                                     \
                 : PTX_D32(0)                                                              \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TA)), "n"(int(TB)));                               \
  }
#define PTX_WGMMA_128(T, NAME, TA, TB)                                                                         \
  template <> PTX_D void wgmma<T, TA, TB, 64>(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"                                  \
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63" \
                 "}, %64, %65, p, 1, 1, %67, %68;\n}"                                                     \
                 : PTX_D32(0), PTX_D32(32)                                                              \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TA)), "n"(int(TB)));                               \
  }
#define PTX_WGMMA_256(T, NAME, TA, TB)                                                                         \
  template <> PTX_D void wgmma<T, TA, TB, 128>(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {"                                  \
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
                 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
                 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
                 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
                 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127" \
                 "}, %128, %129, p, 1, 1, %131, %132;\n}"                                                     \
                 : PTX_D32(0), PTX_D32(32), PTX_D32(64), PTX_D32(96)                                                              \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(TA)), "n"(int(TB)));                               \
  }
#define PTX_WGMMA_MAJORS(N, T, NAME) \
  N(T, NAME, false, false) N(T, NAME, false, true) N(T, NAME, true, false) N(T, NAME, true, true)
PTX_WGMMA_MAJORS(PTX_WGMMA_64, bf16, "bf16")
PTX_WGMMA_MAJORS(PTX_WGMMA_64, f16, "f16")
PTX_WGMMA_MAJORS(PTX_WGMMA_128, bf16, "bf16")
PTX_WGMMA_MAJORS(PTX_WGMMA_128, f16, "f16")
PTX_WGMMA_MAJORS(PTX_WGMMA_256, bf16, "bf16")
PTX_WGMMA_MAJORS(PTX_WGMMA_256, f16, "f16")
#undef PTX_WGMMA_MAJORS
#undef PTX_WGMMA_64
#undef PTX_WGMMA_128
#undef PTX_WGMMA_256
#undef PTX_D32
#undef PTX_D8

}  // namespace ptx
#endif
