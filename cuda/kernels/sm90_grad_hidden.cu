// The gradient of the hidden states by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_hidden.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

// Of some units, a box of their gate columns and one of their up columns, or two of both.
template <class S> struct HiddenBoxes {
  ResultBox<S> of[2];

  // The hidden columns of `unit` and the next, of the thread's row h; `box` has them if they are pairs.
  PTX_D void get(bool pairs, int box, int unit, int h, float (&gate)[2], float (&up)[2]) const {
    using T = typename S::Element;
    const int column = 2 * unit % BOX;  // of pairs
    const ResultBox<S>& both = of[box];
    const uint32_t first = pairs ? both.get(h, column) : of[0].get(h, unit), second = pairs ? both.get(h, column + 2) : of[1].get(h, unit);
    const float a = low_half<T>(first), b = high_half<T>(first), c = low_half<T>(second), d = high_half<T>(second);
    gate[0] = a, gate[1] = pairs ? c : b, up[0] = pairs ? b : c, up[1] = d;
  }
  PTX_D void put(bool pairs, int box, int unit, int h, const float (&gate)[2], const float (&up)[2]) const {
    const int column = 2 * unit % BOX;
    const ResultBox<S>& both = of[box];
    if (pairs) {
      both.put(h, column, gate[0], up[0]);
      both.put(h, column + 2, gate[1], up[1]);
    } else {
      of[0].put(h, unit, gate[0], gate[1]);
      of[1].put(h, unit, up[0], up[1]);
    }
  }
};

// Of a warp: hidden columns of two turns, one being loaded while gradients take the place of the other's, and a box of
// activations. All that a turn stores is one group.
template <class S> class HiddenTurns {
  static_assert(S::BUFFERS >= 5);
  uint32_t turn = 0;

  PTX_D static HiddenBoxes<S> boxes(uint32_t turn) {
    return {{ResultBox<S>::of_warp(turn % 2 * 2), ResultBox<S>::of_warp(turn % 2 * 2 + 1)}};
  }
  PTX_D static Shared loaded() { return S::loaded(S::warp_row() / WARP_ROWS); }

 public:
  // Loads the next turn's at `column` of rows from `row` on, the second from `apart` columns further on. The group before the
  // last one has been read.
  PTX_D void load(const TensorMap& first, const TensorMap& second, int column, int apart, int row, bool both) {
    if (!leads_warp()) return;
    const HiddenBoxes<S> to = boxes(turn);
    mbarrier_arrive_expect(loaded(), ResultBox<S>::BYTES * (1 + both));
    tma_load(to.of[0].base, &first, loaded(), column, row, 0);
    if (both) tma_load(to.of[1].base, &second, loaded(), column + apart, row, 0);
  }
  // The boxes of a new turn, when they are there.
  PTX_D HiddenBoxes<S> next() {
    if (!BUG(hidden_wgmma_no_wait)) mbarrier_wait(loaded(), turn & 1);
    return boxes(turn++);
  }
  PTX_D ResultBox<S> activations() const { return ResultBox<S>::of_warp(4); }
};

template <class S, Major MW> struct GradHiddenByWarpgroups : GradHidden<S, MW> {
  using T = typename S::Element;
  using Results = HiddenTurns<S>;
  static constexpr bool SHARES_A = false;
  // Units of a turn. A part of them is computed at a time.
  static constexpr int UNITS = BOX, PART = 16, PARTS = UNITS / PART, PAIRS = PART / 4;
  // Of a thread, [i] is of row i % 2 and unit lane_column(i / 2) of a part, and the next.
  using Values = float[PAIRS][2];
  // Of hidden or its gate columns, and of its up columns; of the gradient of these, and of scaled_act.
  const TensorMap (&in)[2], (&out)[3];

  PTX_D bool gated() const { return this->activation.gated(); }
  PTX_D bool pairs() const { return gated() && this->p.interleaved; }
  PTX_D bool halves() const { return gated() && !this->p.interleaved; }

  PTX_D void load(Results& turns, int unit, int row) const {
    turns.load(in[0], in[halves() && !BUG(hidden_wgmma_gate_twice)], pairs() ? 2 * unit : unit, pairs() ? BOX : 0, row, gated());
  }
  PTX_D void prefetch(const RowTile& tile, Results& turns) const {
    const int row = tile.row + S::warp_row();
    if (row >= tile.end) return;
    boxes_are_free<0>();
    load(turns, tile.n * S::BN, row);
  }

  PTX_D void finish(const RowTile& tile, typename S::Sums& c, Results& turns) const {
    const GradHiddenParams<T>& p = this->p;
    const int I = p.intermediate, row = tile.row + S::warp_row(), last = tile.n * S::BN + S::BN - UNITS;
    if (row >= tile.end) return;
    float weights[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int at = row + S::lane_row(h);
      weights[h] = !p.weights ? 1 : at < tile.end ? load_readonly(p.weights + at) : 0;
    }
#pragma unroll 1
    for (int first = tile.n * S::BN; first <= last; first += UNITS) {
      const HiddenBoxes<S> boxes = turns.next();
      boxes_are_free<0>();
      if (first < last) load(turns, first + UNITS, row);
      float slopes[2];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if (part * PART % RUN == 0) slopes[0] = slopes[1] = 0;
        Values grad, gate, up, act;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
          boxes.get(pairs(), 2 * part / PARTS, part * PART + S::lane_column(i / 2), i % 2, gate[i], up[i]);
#pragma unroll
          for (int b = 0; b < 2; b++) grad[i][b] = weights[i % 2] * c[(part * PAIRS + i) * 2 + b];
        }
        this->activation.backward(grad, gate, up, act);
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
          const int unit = part * PART + S::lane_column(i / 2);
#pragma unroll
          for (int b = 0; b < 2; b++)
            if (first + unit + b < I) slopes[i % 2] += c[(part * PAIRS + i) * 2 + b] * act[i][b];
          boxes.put(pairs(), 2 * part / PARTS, unit, i % 2, gate[i], up[i]);
          turns.activations().put(i % 2, unit, weights[i % 2] * act[i][0], weights[i % 2] * act[i][1]);
        }
        if (p.slopes && (part + 1) * PART % RUN == 0) store_slopes(tile, first + part * PART / RUN * RUN, slopes);
      }
      boxes_are_full();
      store_gradients(boxes, turns.activations(), first, row, tile.end);
      if (leads_warp()) tma_store_commit();
#pragma unroll
      for (int i = 0; i < S::BN / 2 - UNITS / 2; i++) c[i] = c[i + UNITS / 2];
    }
  }

  PTX_D void store_gradients(const HiddenBoxes<S>& boxes, const ResultBox<S>& activations, int first, int row, int end) const {
    const GradHiddenParams<T>& p = this->p;
    const int I = p.intermediate, columns = gated() ? 2 * I : I, width = halves() ? I : columns, column = pairs() ? 2 * first : first;
    if (p.grad_hidden) {
      boxes.of[0].store(Target<T>{out[0], p.grad_hidden, columns, width}, column, row, end);
      if (gated())
        boxes.of[1].store(Target<T>{out[halves()], p.grad_hidden + (halves() ? I : 0), columns, width}, pairs() ? column + BOX : column, row, end);
    }
    if (p.scaled_act) activations.store(Target<T>{out[2], p.scaled_act, I, I}, first, row, end);
  }

  // Of the run that begins with `unit`.
  PTX_D void store_slopes(const RowTile& tile, int unit, const float (&slopes)[2]) const {
    const GradHiddenParams<T>& p = this->p;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = tile.row + S::warp_row() + S::lane_row(h);
      float slope = slopes[h] + shfl_xor(slopes[h], 1);
      slope += shfl_xor(slope, 2);
      if (row < tile.end && unit < p.intermediate && quad_lane() == 0)
        store(p.slopes + (static_cast<int64_t>(row) * ceil_div(p.intermediate, RUN) + unit / RUN), slope);
    }
  }
};

template <class S, Major MW> PTX_D void grad_hidden_wgmma(const Mapped<GradHiddenParams<typename S::Element>>& p) {
  run_pipeline<S, Major::K, MW>(GradHiddenByWarpgroups<S, MW>{{p.params}, p.in, p.out}, Boxes<S, S::BM, Major::K, true>(), TensorBoxes<S, S::BN, MW>(p.b));
}

WARPGROUP_ROW_ENTRIES(grad_hidden, GradHiddenParams)
