// Up projection with the activation behind it:
//
//   hidden[r] = x[gather[r]] W1[e]^T + b1[e]      for the sorted rows r of expert e, x a row of zeros where gather is -1
//   act[r]    = activation(hidden[r])
//
// T tokens, H hidden, I intermediate, E experts, R sorted rows; N = 2I columns for gated activations, else I. Rows behind
// the last expert's become zeros. The activation is computed from the sums before they are rounded.
#pragma once
#include "tile/activation.cuh"
#include "tile/operand.cuh"
#include "tile/runs.cuh"
#include "tile/walk.cuh"

using namespace tile;

template <class T> struct UpParams {
  Global<const T> x;          // [T, H]
  Global<const int> gather;   // [R] token of each sorted row, zeros where it is none; null: x has the sorted rows
  Global<const int> offsets;  // [E+1] first sorted row of each expert
  Global<const T> w1;         // [E, N, H], transposed [E, H, N]
  Global<const T> b1;         // [E, N] or null
  Global<T> hidden;           // [R, N], null where not wanted
  Global<T> act;              // [R, I]
  int tokens;                 // T, not used without gather
  int rows;                   // R
  int hidden_size;            // H
  int intermediate;           // I
  int experts;                // E
  int activation;             // tile::Kind
  int interleaved;            // 1: gate and up columns alternate; 0: gate columns, then up columns
  int transposed;             // 1: w1 is [E, H, N]
};

template <class S, Major MA, Major MB> struct Up {
  using T = typename S::Element;
  static constexpr bool ALIGNED = MB != Major::ANY;
  const UpParams<T>& p;

  PTX_D bool gated() const { return Activation::gated(static_cast<Kind>(p.activation)); }
  PTX_D bool halves() const { return gated() && !p.interleaved; }
  PTX_D int columns() const { return gated() ? 2 * p.intermediate : p.intermediate; }

  // Column of W1 that is column i of the left (0) or right (1) half of the n-th tile, or -1. Where gate and up columns
  // come in halves, so they do in the tile.
  PTX_D int column(int n, int half, int i) const {
    const int at = n * (halves() ? S::BN / 2 : S::BN) + i;
    if (halves()) return at < p.intermediate ? (BUG(up_gate_twice) ? 0 : half * p.intermediate) + at : -1;
    return at + half * (S::BN / 2) < columns() ? at + half * (S::BN / 2) : -1;
  }

  PTX_D RowWalk<typename S::Teams> walk() const {
    return {p.offsets, p.experts, p.rows, S::BM, ceil_div(columns(), S::BN)};
  }

  PTX_D int height(const RowTile& tile) const { return tile.end - tile.row; }

  template <class A, class B> PTX_D int start(const RowTile& tile, A& a, B& b) const {
    if (!tile.used) return 0;
    const Rows<T> tokens{p.x, p.gather, p.hidden_size, p.tokens};
    a.start(tokens, p.hidden_size, [&](int i) { return tile.row + i < tile.end ? tile.row + i : -1; });
    b.start(expert_matrix(p.w1, tile.expert, columns(), p.hidden_size, p.transposed), p.hidden_size,
            [&](unsigned i) { return column(tile.n, i / (S::BN / 2), i % (S::BN / 2)); });
    return p.hidden_size;
  }

  PTX_D void begin(const RowTile& tile, typename S::Sums& c) const {
    begin_with_bias<S>(c, tile.used ? p.b1 : Global<const T>{nullptr}, tile.expert, columns(),
                       [&](int half, int i) { return column(tile.n, half, i); });
  }

  PTX_D void finish(const RowTile& tile, typename S::Sums& c) const {
    const Activation activation(static_cast<Kind>(p.activation));
    const int I = p.intermediate;
    for_each_row<S>(c, [&](int i, int column, const Run& left, const Run& right) {
      const int row = tile.row + i;
      const bool exists = row < tile.end;
      const Global<T> hidden = p.hidden + static_cast<int64_t>(row) * columns(), act = p.act + static_cast<int64_t>(row) * I;
      const int at = tile.n * (halves() ? S::BN / 2 : S::BN) + column;
      const int beside = halves() ? at + I : at + S::BN / 2;
      if (p.hidden) {
        store_run<ALIGNED>(hidden, at, halves() ? I : columns(), left, exists);
        store_run<ALIGNED>(hidden, beside, columns(), right, exists);
      }
      finish_row(activation, act, at, left, right, exists);
    });
  }

  PTX_D void finish_row(const Activation& activation, Global<T> act, int at, const Run& left, const Run& right, bool exists) const {
    Run gate, up, out;
#pragma unroll
    for (int pass = 0; pass < 2; pass++) {
      if (pass == 1 && gated()) break;
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int b = 0; b < 2; b++) {
          gate[j][b] = !gated() ? (pass ? right : left)[j][b] : halves() ? left[j][b] : (b ? right : left)[j][0];
          up[j][b] = halves() ? right[j][b] : (b ? right : left)[j][1];
        }
      activation.forward(gate, up, out);
      if (gated() && !halves()) {
        store_units(act, at / 2, out, 0, exists);
        store_units(act, (at + S::BN / 2) / 2, out, !BUG(up_left_units_twice), exists);
      } else {
        store_run<ALIGNED>(act, at + pass * (S::BN / 2), p.intermediate, out, exists);
      }
    }
  }

  // Of 16 units of a row a thread has computed 4j + lane % 4, out[j][half].
  PTX_D void store_units(Global<T> act, int at, const Run& out, int half, bool exists) const {
    if constexpr (ALIGNED) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = float_bits(out[j][half]);
      transpose_quad(v);
      at += 4 * quad_lane();
      if (exists && at < p.intermediate)
        store_four(act + at, bits_float(v[0]), bits_float(v[1]), bits_float(v[2]), bits_float(v[3]));
    } else {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (const int unit = at + 4 * j + quad_lane(); exists && unit < p.intermediate)
          store(act + unit, from_float<T>(out[j][half]));
    }
  }
};
