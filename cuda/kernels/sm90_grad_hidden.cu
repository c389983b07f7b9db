// The gradient of the hidden states by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_hidden.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

// Of some units, a box of their gate columns and one of their up columns, or two of both.
template <class S> struct HiddenBoxes {
  using T = typename S::Element;
  using Block = typename ResultBox<S>::Block;
  ResultBox<S> of[2];

  // The hidden columns of 16 units, number `part` of them.
  PTX_D void get(bool pairs, int part, Block& gate, Block& up) const {
    if (!pairs) {
      of[0].get(part, gate);
      of[1].get(part, up);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t first = of[part / 2].get_pair(i % 2, column(part, i)), second = of[part / 2].get_pair(i % 2, column(part, i) + 2);
      gate[i][0] = low_half<T>(first), up[i][0] = high_half<T>(first);
      gate[i][1] = low_half<T>(second), up[i][1] = high_half<T>(second);
    }
  }
  PTX_D void put(bool pairs, int part, const Block& gate, const Block& up) const {
    if (!pairs) {
      of[0].put(part, gate);
      of[1].put(part, up);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      of[part / 2].put_pair(i % 2, column(part, i), gate[i][0], up[i][0]);
      of[part / 2].put_pair(i % 2, column(part, i) + 2, gate[i][1], up[i][1]);
    }
  }

 private:
  // Of pairs, in their box.
  PTX_D static int column(int part, int i) { return part % 2 * 32 + 2 * S::lane_column(i / 2); }
};

// Of a warp: hidden columns of two turns, one of which is loaded while gradients take the place of the other's, and a box of
// activations. All that a turn stores is one group. A round is a turn of either.
template <class S> class HiddenTurns {
  static_assert(S::BUFFERS >= 5);
  uint32_t round = 0;

  PTX_D static HiddenBoxes<S> boxes(int place) { return {{ResultBox<S>::of_warp(2 * place), ResultBox<S>::of_warp(2 * place + 1)}}; }
  PTX_D static Shared loaded(int place) { return S::loaded(S::warp_row() / WARP_ROWS, place); }

 public:
  // Loads those of a turn at `column` of rows from `row` on, the second from `apart` columns further on; what the boxes held
  // has been stored.
  PTX_D void load(int place, const TensorMap& first, const TensorMap& second, int column, int apart, int row, bool both) const {
    if (!leads_warp()) return;
    const HiddenBoxes<S> to = boxes(place);
    mbarrier_arrive_expect(loaded(place), ResultBox<S>::BYTES * (1 + both));
    tma_load(to.of[0].base, &first, loaded(place), column, row, 0);
    if (both) tma_load(to.of[1].base, &second, loaded(place), column + apart, row, 0);
  }
  // The boxes of a turn, when they are there.
  PTX_D HiddenBoxes<S> wait(int place) const {
    if (!BUG(hidden_wgmma_no_wait)) mbarrier_wait(loaded(place), round & 1);
    return boxes(place);
  }
  PTX_D void next_round() { round++; }
  PTX_D ResultBox<S> activations() const { return ResultBox<S>::of_warp(4); }
};

template <class S, Major MW> struct GradHiddenByWarpgroups : GradHidden<S, MW> {
  using T = typename S::Element;
  using Results = HiddenTurns<S>;
  // Units of a turn. A part of them is computed at a time.
  static constexpr int UNITS = BOX, PART = 16, PARTS = UNITS / PART, TURNS = S::BN / UNITS, PLACES = 2;
  using Values = typename ResultBox<S>::Block;
  // Of hidden or its gate columns, and of its up columns; of the gradient of these, and of scaled_act.
  const TensorMap (&in)[2], (&out)[3];

  PTX_D bool gated() const { return this->activation.gated(); }
  PTX_D bool pairs() const { return gated() && this->p.interleaved; }
  PTX_D bool halves() const { return gated() && !this->p.interleaved; }

  PTX_D void load(const Results& turns, int place, int unit, int row) const {
    turns.load(place, in[0], in[halves() && !BUG(hidden_wgmma_gate_twice)], pairs() ? 2 * unit : unit, pairs() ? BOX : 0, row, gated());
  }
  PTX_D void prefetch(const RowTile& tile, Results& turns) const {
    const int row = tile.row + S::warp_row();
    if (row >= tile.end) return;
    boxes_are_free<0>();
    for (int place = 0; place < PLACES; place++) load(turns, place, tile.n * S::BN + place * UNITS, row);
  }

  PTX_D void finish(const RowTile& tile, typename S::Sums& c, Results& turns) const {
    const GradHiddenParams<T>& p = this->p;
    const int I = p.intermediate, row = tile.row + S::warp_row();
    if (row >= tile.end) return;
    float weights[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int at = row + S::lane_row(h);
      weights[h] = !p.weights ? 1 : at < tile.end ? load_readonly(p.weights + at) : 0;
    }
    if (tile.n * S::BN + S::BN > I) clear_behind(c, I - tile.n * S::BN);
    const int needed = tile.n * S::BN + S::BN / 2 < I ? TURNS : TURNS / 2;  // others have no units
#pragma unroll 1
    for (int round = 0; round < needed; round += PLACES) {
#pragma unroll
      for (int place = 0; place < PLACES; place++) {
        const int turn = round + place, first = tile.n * S::BN + turn * UNITS;
        const HiddenBoxes<S> boxes = turns.wait(place);
        uint32_t scaled_act[PARTS][4];
        float slopes[2];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const auto sum = [&](int i, int b) -> float& { return c[(place * PARTS + part) * 8 + 2 * i + b]; };
          if (part * PART % RUN == 0) slopes[0] = slopes[1] = 0;
          Values grad, gate, up, act;
          boxes.get(pairs(), part, gate, up);
#pragma unroll
          for (int i = 0; i < 4; i++)
#pragma unroll
            for (int b = 0; b < 2; b++) grad[i][b] = weights[i % 2] * sum(i, b);
          this->activation.backward(grad, gate, up, act);
          boxes.put(pairs(), part, gate, up);
#pragma unroll
          for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int b = 0; b < 2; b++) slopes[i % 2] += sum(i, b) * act[i][b];
            scaled_act[part][i] = pack<T>(weights[i % 2] * act[i][0], weights[i % 2] * act[i][1]);
          }
          if (p.slopes && (part + 1) * PART % RUN == 0) store_slopes(tile, first + part * PART / RUN * RUN, slopes);
          if (part == PARTS / 2 && turn + 1 >= PLACES && turn + 1 < needed) {
            boxes_are_free<0>();
            load(turns, 1 - place, first + UNITS, row);
          }
        }
        boxes_are_free<0>();
#pragma unroll
        for (int part = 0; part < PARTS; part++) turns.activations().put(part, scaled_act[part]);
        boxes_are_full();
        store_gradients(boxes, turns.activations(), first, row, tile.end);
        if (leads_warp()) tma_store_commit();
      }
      turns.next_round();
#pragma unroll
      for (int i = 0; i < S::BN / 2 - PLACES * UNITS / 2; i++) c[i] = c[i + PLACES * UNITS / 2];
    }
  }

  // Sums of columns from `columns` on, which are no units, are those of zeros, but not where a gradient is not finite.
  PTX_D static void clear_behind(typename S::Sums& c, int columns) {
#pragma unroll
    for (int i = 0; i < S::BN / 2; i++)
      if (S::lane_column(i / 4) + i % 2 >= columns) c[i] = 0;
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

WARPGROUP_ROW_ENTRIES(grad_hidden, GradHiddenParams, WideResultTile)
