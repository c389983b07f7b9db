// Gradients of weights: over the sorted rows r of each expert e
//
//   out[e] = sum of a[r]^T b[r]      [M, N]
//
// where one factor may be gathered: dL/dW1 = grad_hidden^T x[gather], dL/dW2 = grad_out[gather]^T scaled_act; transposed
// weights have the factors exchanged. E experts, R sorted rows. An expert without rows gets zeros. Gradients that are
// added, to `sum` in float or to `out`, leave it as it is.
#pragma once
#include "tile/operand.cuh"
#include "tile/runs.cuh"
#include "tile/walk.cuh"

using namespace tile;

template <class T> struct GradWeightParams {
  Global<const T> a;            // [R, M], gathered [T, M]
  Global<const T> b;            // [R, N], gathered [T, N]
  Global<const int> gather_a;   // [R] row of a for each sorted row, zeros where it is none; null: the sorted row
  Global<const int> gather_b;   // [R] the same for b
  Global<const int> offsets;    // [E+1] first sorted row of each expert
  Global<T> out;                // [E, M, N], not used where `sum` is given
  Global<float> sum;            // [E, M, N] that is added to, or null
  int adds;                     // `out` is added to
  int tokens;                   // T, rows of a factor that is gathered
  int rows;                     // R
  int m, n;                     // M, N
  int experts;                  // E
};

template <class S, Major MAJOR> struct GradWeight {
  using T = typename S::Element;
  static constexpr bool ALIGNED = MAJOR != Major::ANY;
  const GradWeightParams<T>& p;

  PTX_D MatrixWalk<typename S::Teams> walk() const { return {p.experts, ceil_div(p.m, S::BM), ceil_div(p.n, S::BN)}; }

  PTX_D int height(const MatrixTile& tile) const { return p.m - tile.m * S::BM; }

  template <class A, class B> PTX_D int start(const MatrixTile& tile, A& a, B& b) const {
    const int first = row_offset(p.offsets, tile.expert, p.rows), rows = rows_of(tile.expert);
    if (rows <= 0) return 0;
    a.start(Rows<T>{p.a, p.gather_a, p.m, p.tokens}.from(BUG(weight_first_rows) ? 0 : first), rows,
            [&](int i) { return tile.m * S::BM + i < p.m ? tile.m * S::BM + i : -1; });
    b.start(Rows<T>{p.b, p.gather_b, p.n, p.tokens}.from(first), rows,
            [&](int i) { return tile.n * S::BN + i < p.n ? tile.n * S::BN + i : -1; });
    return rows;
  }

  PTX_D void begin(const MatrixTile&, typename S::Sums& c) const { begin_with_zeros<S>(c); }

  PTX_D void finish(const MatrixTile& tile, typename S::Sums& c) const {
    // Adding zeros would turn -0 into 0, and cost as much as adding numbers.
    if ((p.sum || p.adds) && !BUG(weight_adds_zeros) && rows_of(tile.expert) <= 0) return;
    for_each_row<S>(c, [&](int i, int column, Run& left, Run& right) {
      const int row = tile.m * S::BM + i, at = tile.n * S::BN + column;
      const int64_t start = (static_cast<int64_t>(BUG(weight_first_expert) ? 0 : tile.expert) * p.m + row) * p.n;
      if (p.sum) put(p.sum + start, at, left, right, row < p.m, true);
      else put(p.out + start, at, left, right, row < p.m, p.adds);
    });
  }

  template <class To> PTX_D void put(Global<To> row, int at, Run& left, Run& right, bool exists, bool adds) const {
    if (adds) {
      add_run<ALIGNED>(left, row, at, p.n, exists);
      add_run<ALIGNED>(right, row, at + S::BN / 2, p.n, exists);
      if (!BUG(weight_stores_early)) sync_warp();  // lanes trade columns: what one stores others have read
    }
    store_run<ALIGNED>(row, at, p.n, left, exists);
    store_run<ALIGNED>(row, at + S::BN / 2, p.n, right, exists);
  }

  PTX_D int rows_of(int expert) const {
    return row_offset(p.offsets, expert + 1, p.rows) - row_offset(p.offsets, expert, p.rows);
  }
};
