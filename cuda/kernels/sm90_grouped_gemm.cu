// The grouped product by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grouped_gemm.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> PTX_D void gemm_wgmma(const GemmParams<typename S::Element>& p) {
  run_pipeline<S, Major::K, MW>(Gemm<S, MW>{p}, Boxes<S, S::BM, Major::K, false>(), Boxes<S, S::BN, MW, false>());
}

WARPGROUP_ROW_ENTRIES(gemm, GemmParams)
