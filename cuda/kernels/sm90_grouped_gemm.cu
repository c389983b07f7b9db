// The grouped product by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grouped_gemm.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> struct GemmByWarpgroups : Gemm<S, MW> {
  using T = typename S::Element;
  using Results = LateResults<S>;
  const TensorMap& y;

  PTX_D Target<T> target() const { return {y, this->p.y, this->p.columns, this->p.columns}; }
  PTX_D void prefetch(const RowTile&, Results&) const {}
  PTX_D void meanwhile(Results& results) const { results.store_some(target()); }
  PTX_D void end(Results& results) const { results.store_all(target()); }

  PTX_D void finish(const RowTile& tile, typename S::Sums& c, Results& results) const {
    const GemmParams<T>& p = this->p;
    const int row = tile.row + S::warp_row();
    if (row >= tile.end) return;
    end(results);
    if (p.bias && tile.used)
      add_bias<S>(c, p.bias + static_cast<int64_t>(tile.expert) * p.columns, [&](int half, int i) { return this->column(tile.n, half, i); });
    results.take(c, tile.n * S::BN, row, tile.end);
  }
};

template <class S, Major MW> PTX_D void gemm_wgmma(const Mapped<GemmParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MW>(GemmByWarpgroups<S, MW>{{p.params}, p.out[0]}, TensorBoxes<S, S::BM, Major::K>(p.a), TensorBoxes<S, S::BN, MW>(p.b));
}

WARPGROUP_ROW_ENTRIES(gemm, GemmParams, DeepTile)
