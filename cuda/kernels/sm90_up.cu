// The up projection by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/up.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MB> struct UpByWarpgroups : Up<S, Major::K, MB> {
  using T = typename S::Element;
  using Results = ResultRing<S>;
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
        put_sums<S>(box, c, quarter);
        results.store(box, target, halves ? tile.n * units + quarter % 2 * BOX : tile.n * S::BN + quarter * BOX, row, tile.end);
      }
    }
    const Activation activation(static_cast<Kind>(p.activation));
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      if (quarter == 2 && this->gated()) break;
      const ResultBox<S> box = results.next();
      if (this->gated() && !this->halves()) put_activations<true>(box, activation, c, quarter);
      else put_activations<false>(box, activation, c, quarter);
      results.store(box, Target<T>{out[2], p.act, I, I}, tile.n * units + quarter * BOX, row, tile.end);
    }
  }

  static constexpr int SUMS = S::BN / 2, OF_BOX = BOX / 2, BLOCKS = 2;
  using Values = float[4 * BLOCKS][2];  // what the thread has of two blocks of a box

  // The activations of 64 units, number `part` of the tile's. PAIRS: a thread's two columns are gate and up of a unit; else
  // gate columns are in the left half of the tile and their up columns in the right one; ungated, units are columns.
  template <bool PAIRS>
  PTX_D void put_activations(const ResultBox<S>& box, const Activation& activation, const typename S::Sums& c, int part) const {
#pragma unroll
    for (int first = 0; first < OF_BOX; first += 8 * BLOCKS) {
      Values gate, up, out;
#pragma unroll
      for (int i = 0; i < 8 * BLOCKS; i++) {
        const int at = part * OF_BOX + first + i;
        gate[i / 2][i % 2] = c[PAIRS ? 2 * at % SUMS : at];
        up[i / 2][i % 2] = c[PAIRS ? (2 * at + 1) % SUMS : (at + SUMS / 2) % SUMS];
      }
      activation.forward(gate, up, out);
      if constexpr (PAIRS) {
#pragma unroll
        for (int i = 0; i < 8 * BLOCKS; i++) box.put_one(i % 2, S::lane_column((first + i) / 2) / 2, out[i / 2][i % 2]);
      } else {
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
          typename ResultBox<S>::Block values;
#pragma unroll
          for (int i = 0; i < 4; i++) values[i][0] = out[4 * block + i][0], values[i][1] = out[4 * block + i][1];
          box.put(first / 8 + block, values);
        }
      }
    }
  }
};

template <class S, Major MB> PTX_D void up_wgmma(const Mapped<UpParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MB>(UpByWarpgroups<S, MB>{{p.params}, p.out}, Boxes<S, S::BM, Major::K, true>(), TensorBoxes<S, S::BN, MB>(p.b));
}

WARPGROUP_ROW_ENTRIES(up, UpParams, DeepTile)
