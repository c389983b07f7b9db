// The up projection by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/up.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MB> PTX_D void up_wgmma(const UpParams<typename S::Element>& p) {
  run_pipeline<S, Major::K, MB>(Up<S, Major::K, MB>{p}, Boxes<S, S::BM, Major::K, true>(), Boxes<S, S::BN, MB, false>());
}

WARPGROUP_ROW_ENTRIES(up, UpParams)
