// From the gradient of the output to that of the hidden states. With the activation A of
// hidden[r] computed again, dA'[r] = grad_out[gather[r]] W2[e], and s the routing weight of row r,
//
//   grad_hidden[r] = s dA' * activation'(hidden[r])      the columns in hidden's order
//   scaled_act[r]  = s A                                  the factor of dL/dW2
//   slopes[r, i]   = <dA', A> over the 32 units from 32i on, whose sum over i is dL/ds without the share of b2
//
// T tokens, H hidden, I intermediate, E experts, R sorted rows; N = 2I columns for gated activations, else I. The token of
// gather = -1 is a row of zeros, and so are the products of rows behind the last expert's.
#pragma once
#include "tile/activation.cuh"
#include "tile/operand.cuh"
#include "tile/runs.cuh"
#include "tile/walk.cuh"

using namespace tile;

template <class T> struct GradHiddenParams {
  Global<const T> grad_out;       // [T, H]
  Global<const int> gather;       // [R] token of each sorted row, zeros where it is none; null: grad_out has the sorted rows
  Global<const int> offsets;      // [E+1] first sorted row of each expert
  Global<const float> weights;    // [R] routing weight of each sorted row; null: ones
  Global<const T> w2;             // [E, H, I], transposed [E, I, H]
  Global<const T> hidden;         // [R, N] from the forward pass
  Global<T> grad_hidden;          // [R, N], null where not wanted
  Global<T> scaled_act;           // [R, I], null where not wanted
  Global<float> slopes;           // [R, ceil(I / 32)], null where not wanted
  int tokens;                     // T, not used without gather
  int rows;                       // R
  int hidden_size;                // H
  int intermediate;               // I
  int experts;                    // E
  int activation;                 // tile::Kind
  int interleaved;                // 1: gate and up columns of hidden alternate; 0: gate columns, then up columns
  int transposed;                 // 1: w2 is [E, I, H]
};

template <class S, Major MW> struct GradHidden {
  using T = typename S::Element;
  static constexpr bool ALIGNED = MW != Major::ANY;
  const GradHiddenParams<T>& p;
  const Activation activation{static_cast<Kind>(p.activation)};

  PTX_D RowWalk<typename S::Teams> walk() const { return {p.offsets, p.experts, p.rows, S::BM, ceil_div(p.intermediate, S::BN)}; }

  PTX_D int height(const RowTile& tile) const { return tile.end - tile.row; }

  template <class A, class B> PTX_D int start(const RowTile& tile, A& a, B& b) const {
    if (!tile.used || (!p.grad_hidden && !p.slopes)) return 0;
    a.start(Rows<T>{p.grad_out, p.gather, p.hidden_size, p.tokens}, p.hidden_size,
            [&](int i) { return tile.row + i < tile.end ? tile.row + i : -1; });
    b.start(expert_matrix(p.w2, tile.expert, p.intermediate, p.hidden_size, !p.transposed), p.hidden_size,
            [&](int i) { return tile.n * S::BN + i < p.intermediate ? tile.n * S::BN + i : -1; });
    return p.hidden_size;
  }

  PTX_D void begin(const RowTile&, typename S::Sums& c) const { begin_with_zeros<S>(c); }

  PTX_D void finish(const RowTile& tile, typename S::Sums& c) const {
    for_each_row<S>(c, [&](int i, int column, Run& run, Run& right) {
      const int row = tile.row + i;
      const bool exists = row < tile.end;
      const float weight = !p.weights ? 1 : exists ? load_readonly(p.weights + row) : 0;
#pragma unroll 1
      for (int half = 0; half < 2; half++) {
        finish_run(row, tile.n * S::BN + half * (S::BN / 2) + column, weight, run, exists);
#pragma unroll
        for (int j = 0; j < 4; j++) run[j][0] = right[j][0], run[j][1] = right[j][1];
      }
    });
  }

  // The gradients of 32 units of a row from `unit` on.
  PTX_D void finish_run(int row, int unit, float weight, const Run& grad, bool exists) const {
    const int I = p.intermediate, columns = activation.gated() ? 2 * I : I;
    const bool pairs = activation.gated() && p.interleaved;
    const Global<const T> hidden = p.hidden + static_cast<int64_t>(row) * columns;
    const Global<T> grad_hidden = p.grad_hidden + static_cast<int64_t>(row) * columns;
    Run gate, up, act, scaled;
    if (pairs) {
      load_pairs<ALIGNED>(gate, up, hidden, unit, I, exists);
    } else {
      load_run<ALIGNED>(gate, hidden, unit, I, exists);
      if (activation.gated()) load_run<ALIGNED>(up, BUG(hidden_gate_twice) ? hidden : hidden + I, unit, I, exists);
    }
    float slope = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) scaled[j][0] = weight * grad[j][0], scaled[j][1] = weight * grad[j][1];
    activation.backward(scaled, gate, up, act);
#pragma unroll
    for (int j = 0; j < 4; j++)
      for (int b = 0; b < 2; b++) {
        if (exists && unit + 8 * j + 2 * quad_lane() + b < I) slope += (BUG(hidden_slope_scaled) ? scaled : grad)[j][b] * act[j][b];
        act[j][b] *= weight;
      }
    if (p.grad_hidden) {
      if (pairs) {
        store_pairs<ALIGNED>(grad_hidden, unit, I, gate, up, exists);
      } else {
        store_run<ALIGNED>(grad_hidden, unit, I, gate, exists);
        if (activation.gated()) store_run<ALIGNED>(grad_hidden + I, unit, I, up, exists);
      }
    }
    if (p.scaled_act) store_run<ALIGNED>(p.scaled_act + static_cast<int64_t>(row) * I, unit, I, act, exists);
    if (p.slopes) {
      slope += shfl_xor(slope, 1);
      slope += shfl_xor(slope, 2);
      if (exists && unit < I && quad_lane() == 0)
        store(p.slopes + (static_cast<int64_t>(row) * ceil_div(I, RUN) + unit / (BUG(hidden_slope_slot) ? S::BN : RUN)), slope);
    }
  }
};
