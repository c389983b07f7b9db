// The gradients of weights by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_weight.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

// `a` is the factor that may be gathered and `b` comes by TMA. Where the result is TRANSPOSED it is [E, N, M].
template <class S, bool TRANSPOSED> struct GradWeightByWarpgroups : GradWeight<S, Major::MN> {
  using T = typename S::Element;
  using Results = std::conditional_t<TRANSPOSED, TransposedRing<S>, ResultRing<S>>;
  const TensorMap& out;

  PTX_D void prefetch(const MatrixTile&, Results&) const {}

  PTX_D void finish(const MatrixTile& tile, typename S::Sums& c, Results& results) const {
    const GradWeightParams<T>& p = this->p;
    const int row = tile.m * S::BM + S::warp_row(), column = tile.n * S::BN;
    if (p.sum || p.adds) {
      if (this->rows_of(tile.expert) > 0) add_tile(tile.expert, row, column, c);  // as GradWeight::finish
      return;
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      const auto box = results.next();
      put_sums<S>(box, c, quarter);
      results.store(box, out, column + quarter * BOX, row, tile.expert);
    }
  }

  PTX_D void add_tile(int expert, int first_row, int first_column, const typename S::Sums& c) const {
    const GradWeightParams<T>& p = this->p;
    const int64_t matrix = static_cast<int64_t>(expert) * p.m * p.n;
#pragma unroll
    for (int i = 0; i < S::BN / 2; i += 2) {
      const int row = first_row + S::lane_row(i / 2 % 2), column = first_column + S::lane_column(i / 4);
      if (row >= p.m || column >= p.n) continue;
      if constexpr (TRANSPOSED) {
        const int64_t at = matrix + static_cast<int64_t>(column) * p.m + row;
        if (p.sum) add_one(p.sum + at, c[i]), add_one(p.sum + (at + p.m), c[i + 1]);
        else add_one(p.out + at, c[i]), add_one(p.out + (at + p.m), c[i + 1]);
      } else {
        const int64_t at = matrix + static_cast<int64_t>(row) * p.n + column;
        if (p.sum) add(p.sum + at, c[i], c[i + 1]);
        else add_rounded(p.out + at, c[i], c[i + 1]);
      }
    }
  }
  template <class To> PTX_D static void add_one(Global<To> to, float value) { store(to, from_float<To>(to_float(load(to)) + value)); }
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

// The factors of the variant b are exchanged.
template <class S, bool GATHER_A, bool GATHER_B> PTX_D void grad_weight_wgmma(const Mapped<GradWeightParams<typename S::Element>>& p) {
  static_assert(GATHER_A != GATHER_B);
  run_pipeline<S, Major::MN, Major::MN>(GradWeightByWarpgroups<S, GATHER_B>{{p.params}, p.out[0]}, Boxes<S, S::BM, Major::MN, true>(), TensorRows<S, S::BN>(p.b));
}

WARPGROUP_WEIGHT_ENTRIES(grad_weight, GradWeightParams, DeepTile)
