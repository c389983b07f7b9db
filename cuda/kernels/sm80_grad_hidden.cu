// The gradient of the hidden states by mma.sync, for every GPU since Ampere. Entry points: see tile/entries.cuh.
#include "kernels/grad_hidden.cuh"
#include "tile/entries.cuh"
#include "tile/persistent.cuh"

template <class S, Major MA, Major MW> PTX_D void grad_hidden(const GradHiddenParams<typename S::Element>& p) {
  run_tiles<S, MA, MW>(GradHidden<S, MW>{p}, Operand<S, S::BM, MA, true>(false), Operand<S, S::BN, MW, false>(!p.transposed));
}

ROW_ENTRIES(grad_hidden, GradHiddenParams)
