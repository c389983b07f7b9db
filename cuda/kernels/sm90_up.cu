// The up projection by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/up.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MB> struct UpByWarpgroups : Up<S, Major::K, MB> {
  using T = typename S::Element;
  static constexpr bool SHARES_A = false;

  PTX_D void finish(const RowTile& tile, typename S::Sums& c) const {
    const UpParams<T>& p = this->p;
    if (p.b1 && tile.used)
      add_bias<S>(c, p.b1 + static_cast<int64_t>(tile.expert) * this->columns(), [&](int half, int i) { return this->column(tile.n, half, i); });
    const Staged<S> staged;
    const int row = tile.row + S::warp_row();
    if (p.hidden) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        put_half(staged, c, half);
        staged.drain(Lines<T>(p.hidden, row, tile.end, this->columns()), [&](int i) { return this->column(tile.n, half, i); });
      }
    }
    const Activation activation(static_cast<Kind>(p.activation));
    const int first = tile.n * (this->gated() ? STAGED : S::BN);
#pragma unroll
    for (int half = 0; half < (this->gated() ? 1 : 2); half++) {
      put_activations(staged, activation, c, half);
      const int left = first + half * STAGED;
      staged.drain(Lines<T>(p.act, row, tile.end, p.intermediate), [&](int i) { return left + i < p.intermediate ? left + i : -1; });
    }
  }

  // The activations of 128 units, of a run at a time. Gate columns are in the left half and their up columns in the right
  // one, or a thread's two columns are gate and up of a unit; ungated, they are those of one half.
  PTX_D void put_activations(const Staged<S>& staged, const Activation& activation, const typename S::Sums& c, int half) const {
    constexpr int HALF = S::BN / 4, PAIRS = RUN / 4;
    const bool pairs = this->gated() && !this->halves();
#pragma unroll
    for (int first = 0; first < HALF; first += 2 * PAIRS) {
      float gate[PAIRS][2], up[PAIRS][2], out[PAIRS][2];
#pragma unroll
      for (int i = 0; i < 2 * PAIRS; i++) {
        const float left = c[half == 0 ? first + i : HALF + first + i];
        gate[i / 2][i % 2] = pairs ? c[2 * (first + i)] : left;
        up[i / 2][i % 2] = pairs ? c[2 * (first + i) + 1] : c[HALF + first + i];
      }
      activation.forward(gate, up, out);
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const int at = first / 2 + i;  // of all the thread's pairs
        if (pairs) {
#pragma unroll
          for (int b = 0; b < 2; b++) staged.put_one((2 * at + b) % 2, S::lane_column((2 * at + b) / 2) / 2, out[i][b]);
        } else {
          staged.put(at % 2, S::lane_column(at / 2), out[i][0], out[i][1]);
        }
      }
    }
  }
};

template <class S, Major MB> PTX_D void up_wgmma(const Mapped<UpParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MB>(UpByWarpgroups<S, MB>{{p.params}}, Boxes<S, S::BM, Major::K, true>(), TensorBoxes<S, S::BN, MB>(p.b));
}

WARPGROUP_ROW_ENTRIES(up, UpParams)
