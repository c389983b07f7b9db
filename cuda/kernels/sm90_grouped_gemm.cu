// The grouped product by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grouped_gemm.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> struct GemmByWarpgroups : Gemm<S, MW> {
  using T = typename S::Element;
  static constexpr bool SHARES_A = false;

  PTX_D void finish(const RowTile& tile, typename S::Sums& c) const {
    const GemmParams<T>& p = this->p;
    if (p.bias && tile.used)
      add_bias<S>(c, p.bias + static_cast<int64_t>(tile.expert) * p.columns, [&](int half, int i) { return this->column(tile.n, half, i); });
    const Staged<S> staged;
    const Lines<T> lines(p.y, tile.row + S::warp_row(), tile.end, p.columns);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      put_half(staged, c, half);
      staged.drain(lines, [&](int i) { return this->column(tile.n, half, i); });
    }
  }
};

template <class S, Major MW> PTX_D void gemm_wgmma(const Mapped<GemmParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MW>(GemmByWarpgroups<S, MW>{{p.params}}, TensorBoxes<S, S::BM, Major::K>(p.a), TensorBoxes<S, S::BN, MW>(p.b));
}

WARPGROUP_ROW_ENTRIES(gemm, GemmParams)
