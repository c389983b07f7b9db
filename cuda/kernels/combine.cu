// Back to token order: out[t] = sum over k of weights[t, k] * y[inverse[t, k]].
//
// T tokens, H columns, K experts per token, N sorted rows. Sums run in float32, k ascending, from 0: a product is
// rounded, then added and rounded, as in fastmoe-cpu's unpermute; the total is rounded once to the type of the rows.
// A warp takes 32 times 16 bytes of a token, or 32 elements where rows do not start at multiples of 16 bytes.
#include "tile/rows.cuh"

namespace moe {

template <class T> struct CombineParams {
  Global<const T> y;              // [N, H] sorted rows
  Global<const int> inverse;      // [T, K] sorted row, -1 where dropped: adds nothing
  Global<const float> weights;    // [T, K]; null: ones
  Global<T> out;                  // [T, H]
  int tokens, top_k, rows, columns;  // T, K, N, H
};

template <int N, class T> PTX_D void combine_part(const CombineParams<T>& p, int64_t token, int part) {
  const int column = (part * 32 + lane()) * N;
  auto total = Sums<N>::zeros();
  for (int first = 0; first < p.top_k; first += 32) {
    const int count = p.top_k - first < 32 ? p.top_k - first : 32;
    const int64_t slot = token * p.top_k + first + lane();
    const int row = lane() < count ? below(p.rows, load_readonly(p.inverse + slot)) : -1;
    const float weight = lane() < count && p.weights ? load_readonly(p.weights + slot) : 1.0f;
    add_rows(total, p.y, p.columns, column, row, weight, BUG(combine_last_slot) ? count & ~1 : count);
  }
  if (column < p.columns + BUG(combine_tail)) total.store(p.out + (token * p.columns + column));
}

template <class T> PTX_D void combine(const CombineParams<T>& p) {
  if (rows_are_wide<T>(p.columns, p.y) && rows_are_wide<T>(p.columns, p.out))
    for_each_part(p.tokens, parts_of<WIDE<T>>(p.columns), [&](int64_t t, int part) { combine_part<WIDE<T>>(p, t, part); });
  else
    for_each_part(p.tokens, parts_of<1>(p.columns), [&](int64_t t, int part) { combine_part<1>(p, t, part); });
}

}  // namespace moe

PTX_KERNEL(combine_f32, 128, 8, 0, moe::combine, moe::CombineParams<float>)
PTX_KERNEL(combine_bf16, 128, 8, 0, moe::combine, moe::CombineParams<ptx::bf16>)
PTX_KERNEL(combine_f16, 128, 8, 0, moe::combine, moe::CombineParams<ptx::f16>)
