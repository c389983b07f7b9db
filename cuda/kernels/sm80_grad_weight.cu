// The gradients of weights by mma.sync, for every GPU since Ampere. Entry points: see tile/entries.cuh.
#include "kernels/grad_weight.cuh"
#include "tile/entries.cuh"
#include "tile/persistent.cuh"

template <class S, Major MAJOR, bool GATHER_A, bool GATHER_B> PTX_D void grad_weight(const GradWeightParams<typename S::Element>& p) {
  run_tiles<S, MAJOR, MAJOR>(GradWeight<S, MAJOR>{p}, Operand<S, S::BM, MAJOR, GATHER_A>(true), Operand<S, S::BN, MAJOR, GATHER_B>(true));
}

WEIGHT_ENTRIES(grad_weight, GradWeightParams)
