// Grouped product over sorted rows:
//
//   y[r] = a[r] W[e]^T + bias[e]      for the sorted rows r of expert e
//
// It is the down projection (a = act [R, I], W = W2), the gradient of the up projection's input (a = dL/dhidden [R, N],
// W = W1 the other way round) and a grouped GEMM by itself. E experts, R sorted rows, M columns of a, N of y. Rows behind
// the last expert's become zeros.
#pragma once
#include "tile/operand.cuh"
#include "tile/runs.cuh"
#include "tile/walk.cuh"

using namespace tile;

template <class T> struct GemmParams {
  Global<const T> a;          // [R, K]
  Global<const int> offsets;  // [E+1] first sorted row of each expert
  Global<const T> w;          // [E, N, K], transposed [E, K, N]
  Global<const T> bias;       // [E, N] or null
  Global<T> y;                // [R, N]
  int rows;                   // R
  int inner;                  // K
  int columns;                // N
  int experts;                // E
  int transposed;             // 1: w is [E, K, N]
};

template <class S, Major MW> struct Gemm {
  using T = typename S::Element;
  const GemmParams<T>& p;

  PTX_D int column(int n, int half, int i) const {
    const int at = n * S::BN + half * (S::BN / 2) + i;
    return at < p.columns ? at : -1;
  }

  PTX_D RowWalk<typename S::Teams> walk() const { return {p.offsets, p.experts, p.rows, S::BM, ceil_div(p.columns, S::BN)}; }

  PTX_D int height(const RowTile& tile) const { return tile.end - tile.row; }

  template <class A, class B> PTX_D int start(const RowTile& tile, A& a, B& b) const {
    if (!tile.used) return 0;
    a.start(Rows<T>{p.a, {nullptr}, p.inner, 0}, p.inner, [&](int i) { return tile.row + i < tile.end ? tile.row + i : -1; });
    b.start(expert_matrix(p.w, tile.expert, p.columns, p.inner, p.transposed), p.inner,
            [&](int i) { return column(tile.n, 0, i); });
    return p.inner;
  }

  PTX_D void begin(const RowTile& tile, typename S::Sums& c) const {
    begin_with_bias<S>(c, tile.used ? p.bias : Global<const T>{nullptr}, tile.expert, p.columns,
                       [&](int half, int i) { return column(tile.n, half, i); });
  }

  PTX_D void finish(const RowTile& tile, typename S::Sums& c) const {
    for_each_row<S>(c, [&](int i, int column, const Run& left, const Run& right) {
      const int row = tile.row + i, at = tile.n * S::BN + column;
      const Global<T> y = p.y + static_cast<int64_t>(row) * p.columns;
      store_run<MW != Major::ANY>(y, at, p.columns, left, row < tile.end);
      store_run<MW != Major::ANY>(y, at + S::BN / 2, p.columns, right, row < tile.end);
    });
  }
};
