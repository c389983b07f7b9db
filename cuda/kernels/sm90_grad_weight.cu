// The gradients of weights by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_weight.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

// Pairs of blocks share the factor that is not gathered.
template <class S, bool SHARES_A_> struct GradWeightByWarpgroups : GradWeight<S, Major::MN> {
  using T = typename S::Element;
  using Results = LateResults<S>;
  static constexpr bool SHARES_A = SHARES_A_;
  const TensorMap& out;

  PTX_D MatrixWalk<std::conditional_t<SHARES_A, ByColumns, ByRows>> walk() const {
    return {this->p.experts, ceil_div(this->p.m, S::BM), ceil_div(this->p.n, S::BN)};
  }

  PTX_D void prefetch(const MatrixTile&, Results&) const {}
  PTX_D void meanwhile(Results& results) const { results.store_some(out); }
  PTX_D void end(Results& results) const { results.store_all(out); }

  PTX_D void finish(const MatrixTile& tile, typename S::Sums& c, Results& results) const {
    const GradWeightParams<T>& p = this->p;
    if ((p.sum || p.adds) && this->rows_of(tile.expert) <= 0) return;  // as GradWeight::finish
    const int first_row = tile.m * S::BM + S::warp_row(), first_column = tile.n * S::BN;
    if (first_row >= p.m) return;
    if (p.sum || p.adds) {
      const int64_t matrix = static_cast<int64_t>(tile.expert) * p.m * p.n;
#pragma unroll
      for (int i = 0; i < S::BN / 2; i += 2) {
        const int row = S::lane_row(i / 2 % 2), column = S::lane_column(i / 4);
        if (first_row + row >= p.m || first_column + column >= p.n) continue;
        const int64_t at = matrix + static_cast<int64_t>(first_row + row) * p.n + first_column + column;
        if (p.sum) add(p.sum + at, c[i], c[i + 1]);
        else add_rounded(p.out + at, c[i], c[i + 1]);
      }
      return;
    }
    end(results);
    results.take(c, first_column, first_row, tile.expert);
  }

  PTX_D static void add(Global<float> to, float first, float second) {
    const Global<float2> pair = to.template as<float2>();
    const float2 old = load(pair);
    store(pair, float2{old.x + first, old.y + second});
  }
  PTX_D static void add_rounded(Global<T> to, float first, float second) {
    const Global<uint32_t> pair = to.template as<uint32_t>();
    const uint32_t old = load(pair);
    store(pair, pack<T>(low_half<T>(old) + first, high_half<T>(old) + second));
  }
};

template <class S, bool GATHER_A, bool GATHER_B> PTX_D void grad_weight_wgmma(const Mapped<GradWeightParams<typename S::Element>>& p) {
  static_assert(GATHER_A != GATHER_B);
  const GradWeightByWarpgroups<S, GATHER_B> kernel{{p.params}, p.out[0]};
  if constexpr (GATHER_B)
    run_pipeline<S, Major::MN, Major::MN>(kernel, TensorRows<S, S::BM>(p.a), Boxes<S, S::BN, Major::MN, true>());
  else
    run_pipeline<S, Major::MN, Major::MN>(kernel, Boxes<S, S::BM, Major::MN, true>(), TensorRows<S, S::BN>(p.b));
}

WARPGROUP_WEIGHT_ENTRIES(grad_weight, GradWeightParams, DeepTile)
