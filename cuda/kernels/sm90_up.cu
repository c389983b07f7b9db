// The up projection by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/up.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MB> struct UpByWarpgroups : Up<S, Major::K, MB> {
  using T = typename S::Element;
  using Results = ResultRing<S>;
  static constexpr bool SHARES_A = false;
  const TensorMap (&out)[3];  // of hidden or its gate columns, of its up columns, of act

  PTX_D void prefetch(const RowTile&, Results&) const {}

  PTX_D void finish(const RowTile& tile, typename S::Sums& c, Results& results) const {
    const UpParams<T>& p = this->p;
    const int row = tile.row + S::warp_row();
    if (row >= tile.end) return;
    if (p.b1 && tile.used)
      add_bias<S>(c, p.b1 + static_cast<int64_t>(tile.expert) * this->columns(), [&](int half, int i) { return this->column(tile.n, half, i); });
    const int I = p.intermediate, units = this->gated() ? S::BN / 2 : S::BN;
    if (p.hidden) {
      const bool halves = this->halves();
#pragma unroll
      for (int quarter = 0; quarter < 4; quarter++) {
        const bool up = halves && quarter >= 2;
        const Target<T> target{out[up], p.hidden + (up ? I : 0), this->columns(), halves ? I : this->columns()};
        const ResultBox<S> box = results.next();
        box.put_sums(c, quarter);
        results.store(box, target, halves ? tile.n * units + quarter % 2 * BOX : tile.n * S::BN + quarter * BOX, row, tile.end);
      }
    }
    const Activation activation(static_cast<Kind>(p.activation));
#pragma unroll
    for (int quarter = 0; quarter < (this->gated() ? 2 : 4); quarter++) {
      const ResultBox<S> box = results.next();
      put_activations(box, activation, c, quarter);
      results.store(box, Target<T>{out[2], p.act, I, I}, tile.n * units + quarter * BOX, row, tile.end);
    }
  }

  // The activations of 64 units, of a run at a time. Gate columns are in the left half of the tile and their up columns in
  // the right one, or a thread's two columns are gate and up of a unit; ungated, they are those of one quarter.
  PTX_D void put_activations(const ResultBox<S>& box, const Activation& activation, const typename S::Sums& c, int quarter) const {
    constexpr int SUMS = S::BN / 2, OF_BOX = BOX / 2, PAIRS = RUN / 4;
    const bool pairs = this->gated() && !this->halves();
#pragma unroll
    for (int first = 0; first < OF_BOX; first += 2 * PAIRS) {
      float gate[PAIRS][2], up[PAIRS][2], out[PAIRS][2];
#pragma unroll
      for (int i = 0; i < 2 * PAIRS; i++) {
        const int at = quarter * OF_BOX + first + i;
        gate[i / 2][i % 2] = pairs ? c[2 * at % SUMS] : c[at];
        up[i / 2][i % 2] = pairs ? c[2 * at % SUMS + 1] : c[(at + SUMS / 2) % SUMS];
      }
      activation.forward(gate, up, out);
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const int at = first / 2 + i;  // of the thread's pairs in the box
        if (pairs) {
#pragma unroll
          for (int b = 0; b < 2; b++) box.put_one((2 * at + b) % 2, S::lane_column((2 * at + b) / 2) / 2, out[i][b]);
        } else {
          box.put(at % 2, S::lane_column(at / 2), out[i][0], out[i][1]);
        }
      }
    }
  }
};

template <class S, Major MB> PTX_D void up_wgmma(const Mapped<UpParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MB>(UpByWarpgroups<S, MB>{{p.params}, p.out}, Boxes<S, S::BM, Major::K, true>(), TensorBoxes<S, S::BN, MB>(p.b));
}

WARPGROUP_ROW_ENTRIES(up, UpParams)
