// The grouped product by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grouped_gemm.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> struct GemmByWarpgroups : Gemm<S, MW> {
  using T = typename S::Element;

  PTX_D void prefetch(const RowWalk::Tile&) const {}

  PTX_D void finish(const RowWalk::Tile& tile, typename S::Sums& c) const {
    const GemmParams<T>& p = this->p;
    const auto column = [&](int panel, int i) { return this->column(tile.n, 0, S::panel_column(panel) + i); };
    if (p.bias && tile.used) add_bias<S>(c, p.bias + static_cast<int64_t>(tile.expert) * p.columns, column);
    const Staged<S> staged;
#pragma unroll
    for (int panel = 0; panel < 2; panel++) {
      put_panel(staged, c, panel);
      const Lines<T> lines(p.y, tile.row + S::panel_row(panel), tile.end, p.columns);
      staged.drain(lines, [&](int i) { return column(panel, i); });
    }
  }
};

template <class S, Major MW> PTX_D void gemm_wgmma(const GemmParams<typename S::Element>& p) {
  run_pipeline<S, Major::K, MW>(GemmByWarpgroups<S, MW>{{p}}, Boxes<S, S::BM, Major::K, false>(), Boxes<S, S::BN, MW, false>());
}

WARPGROUP_ROW_ENTRIES(gemm, GemmParams, 256, 4)
WARPGROUP_ROW_ENTRIES(gemm, GemmParams, 128, 6)
