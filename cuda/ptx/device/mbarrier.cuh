// Barriers in shared memory that count arrivals and bytes (sm_90), fences between the proxies, register budgets.
#pragma once
#include "ptx/device/types.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
namespace ptx {

PTX_D void mbarrier_init(Shared barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier.at), "r"(arrivals) : "memory");
}
PTX_D void mbarrier_arrive(Shared barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier.at) : "memory");
}
PTX_D void mbarrier_arrive_expect(Shared barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier.at), "r"(bytes) : "memory");
}
// `bytes` more are expected in this phase; no arrival.
PTX_D void mbarrier_expect(Shared barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier.at), "r"(bytes) : "memory");
}
// Arrives when all earlier cp.async of this thread have landed; the arrival is not added to the expected count.
PTX_D void cp_async_mbarrier_arrive(Shared barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier.at) : "memory");
}
// Whether the phase of this parity has ended; may suspend the thread for a while.
PTX_D bool mbarrier_try_wait(Shared barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(barrier.at), "r"(parity) : "memory");
  return done;
}
PTX_D void mbarrier_wait(Shared barrier, uint32_t parity) { while (!mbarrier_try_wait(barrier, parity)) {} }

// Makes mbarrier_init visible to the asynchronous proxy and the cluster.
PTX_D void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes ordinary writes to shared memory visible to TMA and wgmma.
PTX_D void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// True in exactly one lane of the warp.
PTX_D bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}
template <int REGISTERS> PTX_D void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> PTX_D void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// Waits for the kernels before this one in the stream; lets those after it begin.
PTX_D void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
PTX_D void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace ptx
#endif
