// The gradients of weights by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_weight.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, bool GATHER_A, bool GATHER_B> PTX_D void grad_weight_wgmma(const GradWeightParams<typename S::Element>& p) {
  run_pipeline<S, Major::MN, Major::MN>(GradWeight<S, Major::MN>{p}, Boxes<S, S::BM, Major::MN, GATHER_A>(), Boxes<S, S::BN, Major::MN, GATHER_B>());
}

WARPGROUP_WEIGHT_ENTRIES(grad_weight, GradWeightParams)
