// The up projection by mma.sync, for every GPU since Ampere. Entry points: see tile/entries.cuh.
#include "kernels/up.cuh"
#include "tile/entries.cuh"
#include "tile/persistent.cuh"

template <class S, Major MA, Major MB> PTX_D void up(const UpParams<typename S::Element>& p) {
  run_tiles<S, MA, MB>(Up<S, MA, MB>{p}, Operand<S, S::BM, MA, true>(false), Operand<S, S::BN, MB, false>(p.transposed));
}

ROW_ENTRIES(up, UpParams)
