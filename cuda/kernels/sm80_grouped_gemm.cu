// The grouped product by mma.sync, for every GPU since Ampere. Entry points: see tile/entries.cuh.
#include "kernels/grouped_gemm.cuh"
#include "tile/entries.cuh"
#include "tile/persistent.cuh"

template <class S, Major MA, Major MW> PTX_D void gemm(const GemmParams<typename S::Element>& p) {
  run_tiles<S, MA, MW>(Gemm<S, MW>{p}, Operand<S, S::BM, MA, false>(false), Operand<S, S::BN, MW, false>(p.transposed));
}

ROW_ENTRIES(gemm, GemmParams)
