// The gradient of the hidden states by wgmma, for Hopper. Entry points: see tile/entries.cuh.
#include "kernels/grad_hidden.cuh"
#include "tile/entries.cuh"
#include "tile/pipeline.cuh"

template <class S, Major MW> struct GradHiddenByWarpgroups : GradHidden<S, MW> {
  using T = typename S::Element;
  static constexpr bool SHARES_A = false;
  // So many units that their gate and up columns fill the staged rows. A part of them is computed at a time.
  static constexpr int UNITS = STAGED / 2, PART = 16, PARTS = UNITS / PART, PAIRS = PART / 4;
  // Of a thread, [i] is of row i % 2 and unit lane_column(i / 2) of a part, and the next.
  using Values = float[PAIRS][2];

  PTX_D void finish(const RowTile& tile, typename S::Sums& c) const {
    const GradHiddenParams<T>& p = this->p;
    const int I = p.intermediate, columns = this->activation.gated() ? 2 * I : I;
    const bool pairs = this->activation.gated() && p.interleaved;
    const int first_row = tile.row + S::warp_row();
    float weights[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + S::lane_row(h);
      weights[h] = !p.weights ? 1 : row < tile.end ? load_readonly(p.weights + row) : 0;
    }
    const Staged<S> staged;
#pragma unroll 1
    for (int first = tile.n * S::BN; first < (tile.n + 1) * S::BN; first += UNITS) {
      // Where an element of the staged rows is in hidden, -1 where it is not.
      const auto column = [&](int i) {
        const int unit = first + (pairs ? i / 2 : i % UNITS);
        if (unit >= I || (i >= UNITS && !this->activation.gated())) return -1;
        return pairs ? 2 * first + i : unit + (i < UNITS || BUG(hidden_wgmma_gate_twice) ? 0 : I);
      };
      staged.fill(Lines<const T>(p.hidden, first_row, tile.end, columns), column);
      uint32_t scaled_act[PARTS * PAIRS];
      float slopes[2];
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        if (part * PART % RUN == 0) slopes[0] = slopes[1] = 0;
        Values grad, gate, up, act;
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
          get(staged, pairs, part * PART + S::lane_column(i / 2), i % 2, gate[i], up[i]);
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
          put(staged, pairs, unit, i % 2, gate[i], up[i]);
          scaled_act[part * PAIRS + i] = pack<T>(weights[i % 2] * act[i][0], weights[i % 2] * act[i][1]);
        }
        if (p.slopes && (part + 1) * PART % RUN == 0) store_slopes(tile, first + part * PART / RUN * RUN, slopes);
      }
      if (p.grad_hidden) staged.drain(Lines<T>(p.grad_hidden, first_row, tile.end, columns), column);
      else sync_warp();
      if (p.scaled_act) {
#pragma unroll
        for (int i = 0; i < PARTS * PAIRS; i++) staged.put_pair(i % 2, S::lane_column(i / 2), scaled_act[i]);
        staged.drain(Lines<T>(p.scaled_act, first_row, tile.end, I), [&](int i) { return i < UNITS && first + i < I ? first + i : -1; });
      }
#pragma unroll
      for (int i = 0; i < S::BN / 2 - UNITS / 2; i++) c[i] = c[i + UNITS / 2];
    }
  }

  // The hidden columns of `unit` and the next, of the thread's row h.
  PTX_D static void get(const Staged<S>& staged, bool pairs, int unit, int h, float (&gate)[2], float (&up)[2]) {
    const uint32_t first = staged.get(h, pairs ? 2 * unit : unit), second = staged.get(h, pairs ? 2 * unit + 2 : UNITS + unit);
    const float a = low_half<T>(first), b = high_half<T>(first), c = low_half<T>(second), d = high_half<T>(second);
    gate[0] = a, gate[1] = pairs ? c : b, up[0] = pairs ? b : c, up[1] = d;
  }
  PTX_D static void put(const Staged<S>& staged, bool pairs, int unit, int h, const float (&gate)[2], const float (&up)[2]) {
    staged.put(h, pairs ? 2 * unit : unit, gate[0], pairs ? up[0] : gate[1]);
    staged.put(h, pairs ? 2 * unit + 2 : UNITS + unit, pairs ? gate[1] : up[0], up[1]);
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
  run_pipeline<S, Major::K, MW>(GradHiddenByWarpgroups<S, MW>{{p.params}}, Boxes<S, S::BM, Major::K, true>(), TensorBoxes<S, S::BN, MW>(p.b));
}

WARPGROUP_ROW_ENTRIES(grad_hidden, GradHiddenParams)
