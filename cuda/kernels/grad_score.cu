// The gradient of the routing weights: dS[t, k] = <dL/d out[t], y[t, k]>, finished from what the dH kernel left.
//
// That kernel sums <dL/d act, act> over the hidden units of each of its tiles; the bias of the second product adds
// <dL/d out[t], b2[e]>. T tokens, K experts per token, E experts, N sorted rows, H columns, B tiles.
#include "tile/rows.cuh"

namespace moe {

template <class T> struct GradScoreParams {
  Global<const float> partial;   // [N, B]
  Global<const int> inverse;     // [T, K] sorted row, -1 where dropped: its gradient is 0
  Global<const T> grad_out;      // [T, H]; needed with b2
  Global<const T> b2;            // [E, H]; may be null
  Global<const int> offsets;     // [E + 1]; needed with b2
  Global<float> grad_weights;    // [T, K]
  int tokens, top_k, rows, experts, columns, blocks;  // T, K, N, E, H, B
};

// The expert that owns a sorted row.
PTX_D int owner(Global<const int> offsets, int experts, int row) {
  int low = 0, high = experts;  // offsets[low] <= row < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const int offset = load_readonly(offsets + middle);
    if (BUG(score_empty_expert) ? offset < row : offset <= row)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Without a bias: a thread for each (t, k), the tiles in order.
template <class T> PTX_D void grad_score_of_tiles(const GradScoreParams<T>& p) {
  const int64_t slots = static_cast<int64_t>(p.tokens) * p.top_k;
  const int64_t threads = static_cast<int64_t>(block_count()) * block_threads();
  for (int64_t slot = static_cast<int64_t>(block_id()) * block_threads() + thread_id(); slot < slots; slot += threads) {
    const int64_t row = below(p.rows, load_readonly(p.inverse + slot));
    float sum = 0.0f;
    for (int i = 0; row >= 0 && i < p.blocks; i++) sum = add_rn(sum, load_readonly(p.partial + (row * p.blocks + i)));
    store(p.grad_weights + slot, sum);
  }
}

// With a bias: a warp for each (t, k). A lane adds its tiles, then the products of its columns; then the lanes.
template <int N, class T> PTX_D void grad_score_slot(const GradScoreParams<T>& p, int64_t slot) {
  const int row = below(p.rows, load_readonly(p.inverse + slot));
  float sum = 0.0f;
  if (row >= 0) {
    for (int i = lane(); i < p.blocks; i += 32)
      sum = add_rn(sum, load_readonly(p.partial + (static_cast<int64_t>(row) * p.blocks + i)));
    const Global<const T> grad = p.grad_out + slot / p.top_k * p.columns;
    const Global<const T> bias = p.b2 + static_cast<int64_t>(owner(p.offsets, p.experts, row)) * p.columns;
    for (int column = lane() * N; column < p.columns; column += 32 * N)
      sum = dot(Cells<T, N>::load(grad + column), Cells<T, N>::load(bias + column), sum);
  }
  sum = sum_of_lanes(sum);
  if (lane() == 0) store(p.grad_weights + slot, sum);
}

template <class T> PTX_D void grad_score(const GradScoreParams<T>& p) {
  const int64_t slots = static_cast<int64_t>(p.tokens) * p.top_k;
  if (!p.b2)
    grad_score_of_tiles(p);
  else if (rows_are_wide<T>(p.columns, p.grad_out) && rows_are_wide<T>(p.columns, p.b2))
    for_each_part(slots, 1, [&](int64_t slot, int) { grad_score_slot<WIDE<T>>(p, slot); });
  else
    for_each_part(slots, 1, [&](int64_t slot, int) { grad_score_slot<1>(p, slot); });
}

}  // namespace moe

PTX_KERNEL(grad_score_f32, 128, 8, 0, moe::grad_score, moe::GradScoreParams<float>)
PTX_KERNEL(grad_score_bf16, 128, 8, 0, moe::grad_score, moe::GradScoreParams<ptx::bf16>)
PTX_KERNEL(grad_score_f16, 128, 8, 0, moe::grad_score, moe::GradScoreParams<ptx::f16>)
