// The grouped product by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grouped_gemm.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> struct GemmByWarpgroups : Gemm<S, MW> {
  using T = typename S::Element;
  using Results = ResultRing<S>;
  const TensorMap& y;

  PTX_D void prefetch(const RowTile&, Results&) const {}

  PTX_D void finish(const RowTile& tile, typename S::Sums& c, Results& results) const {
    const GemmParams<T>& p = this->p;
    const int row = tile.row + S::warp_row();
    if (row >= tile.end) return;
    if (p.bias && tile.used)
      add_bias<S>(c, p.bias + static_cast<int64_t>(tile.expert) * p.columns, [&](int half, int i) { return this->column(tile.n, half, i); });
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      const ResultBox<S> box = results.next();
      put_sums<S>(box, c, quarter);
      results.store(box, Target<T>{y, p.y, p.columns, p.columns}, tile.n * S::BN + quarter * BOX, row, tile.end);
    }
  }
};

template <class S, Major MW> PTX_D void gemm_wgmma(const Mapped<GemmParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MW>(GemmByWarpgroups<S, MW>{{p.params}, p.out[0]}, TensorBoxes<S, S::BM, Major::K>(p.a), TensorBoxes<S, S::BN, MW>(p.b));
}

WARPGROUP_ROW_ENTRIES(gemm, GemmParams, DeepTile)
