// The gradient of the hidden states by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_hidden.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> PTX_D void grad_hidden_wgmma(const GradHiddenParams<typename S::Element>& p) {
  run_pipeline<S, Major::K, MW>(GradHidden<S, MW>{p}, Boxes<S, S::BM, Major::K, true>(), Boxes<S, S::BN, MW, false>());
}

WARPGROUP_ROW_ENTRIES(grad_hidden, GradHiddenParams)
