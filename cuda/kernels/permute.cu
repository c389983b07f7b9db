// Rows between token order and expert order, and the gradients of the way back.
//
// T tokens, H columns, K experts per token, N sorted rows. The way back, and the gradient of the way there, is
// combine.cu.
#include "tile/rows.cuh"

namespace moe {

template <class T> struct PermuteParams {
  Global<const T> x;         // [T, H]
  Global<const int> gather;  // [N] token of each sorted row, -1: zeros
  Global<T> out;             // [N, H]
  int tokens, rows, columns;  // T, N, H
};

template <int N, class T> PTX_D void permute_part(const PermuteParams<T>& p, int64_t row, int part) {
  const int column = (part * 32 + lane()) * N;
  if (column >= p.columns) return;
  const int64_t token = below(p.tokens, load_readonly(p.gather + row));
  const Global<T> out = p.out + (row * p.columns + column);
  const Global<const T> x = p.x + (token * p.columns + column);
  const auto cells = token < 0 && !BUG(permute_unused) ? Cells<T, N>{} : Cells<T, N>::load(x);
  if constexpr (N == 1)
    store(out, cells.bits);
  else
    store(out.template as<uint4>(), cells.bits);
}

template <class T> PTX_D void permute(const PermuteParams<T>& p) {
  if (rows_are_wide<T>(p.columns, p.x) && rows_are_wide<T>(p.columns, p.out))
    for_each_part(p.rows, parts_of<WIDE<T>>(p.columns), [&](int64_t r, int part) { permute_part<WIDE<T>>(p, r, part); });
  else
    for_each_part(p.rows, parts_of<1>(p.columns), [&](int64_t r, int part) { permute_part<1>(p, r, part); });
}

// The gradients of out[t] = sum over k of weights[t, k] * y[inverse[t, k]].
template <class T> struct UnpermuteGradParams {
  Global<const T> grad_out;      // [T, H]
  Global<const T> y;             // [N, H]; needed for grad_weights
  Global<const int> gather;      // [N]; needed for grad_y
  Global<const int> inverse;     // [T, K]
  Global<const float> weights;   // [T, K]; null: ones
  Global<T> grad_y;              // [N, H] weight * grad_out of the token, zeros in unused rows; may be null
  Global<float> grad_weights;    // [T, K] <grad_out of the token, y>, 0 where dropped; may be null
  int tokens, top_k, rows, columns;  // T, K, N, H
};

// One (t, k) by one warp. The inner product adds the columns of a lane in order, then the lanes.
template <int N, class T> PTX_D void unpermute_grad_slot(const UnpermuteGradParams<T>& p, int64_t slot) {
  const int64_t row = below(p.rows, load_readonly(p.inverse + slot));
  const float weight = p.weights ? load_readonly(p.weights + slot) : 1.0f;
  const Global<const T> grad = p.grad_out + slot / p.top_k * p.columns;
  float sum = 0.0f;
  for (int column = lane() * N; row >= 0 && column < p.columns; column += 32 * N) {
    const auto g = Cells<T, N>::load(grad + column);
    const int64_t at = row * p.columns + column;
    if (p.grad_weights) sum = dot(g, Cells<T, N>::load(p.y + at), sum);
    if (!p.grad_y) continue;
    auto scaled = Sums<N>::zeros();
    scaled.add_scaled(weight, g);
    scaled.store(p.grad_y + at);
  }
  sum = sum_of_lanes(sum);
  if (p.grad_weights && lane() == 0) store(p.grad_weights + slot, sum);
}

template <int N, class T> PTX_D void zero_unused_part(const UnpermuteGradParams<T>& p, int64_t row, int part) {
  const int column = (part * 32 + lane()) * N;
  if (column < p.columns && load_readonly(p.gather + row) < 0)
    Sums<N>::zeros().store(p.grad_y + (row * p.columns + column));
}

template <int N, class T> PTX_D void unpermute_grad_by(const UnpermuteGradParams<T>& p) {
  const int64_t slots = static_cast<int64_t>(p.tokens) * p.top_k;
  for_each_part(slots, 1, [&](int64_t slot, int) { unpermute_grad_slot<N>(p, slot); });
  if (p.grad_y && !BUG(unpermute_unused))
    for_each_part(p.rows, parts_of<N>(p.columns), [&](int64_t row, int part) { zero_unused_part<N>(p, row, part); });
}

template <class T> PTX_D void unpermute_grad(const UnpermuteGradParams<T>& p) {
  const bool wide = rows_are_wide<T>(p.columns, p.grad_out) && rows_are_wide<T>(p.columns, p.y);
  if (wide && rows_are_wide<T>(p.columns, p.grad_y))
    unpermute_grad_by<WIDE<T>>(p);
  else
    unpermute_grad_by<1>(p);
}

// sorted[inverse[t, k]] = weights[t, k], 0 in unused rows.
struct SortWeightsParams {
  Global<const float> weights;  // [T, K]
  Global<const int> gather;     // [N]
  Global<const int> inverse;    // [T, K]
  Global<float> sorted;         // [N]
  int slots, rows;              // T*K, N
};

PTX_D void sort_weights(const SortWeightsParams& p) {
  const int64_t first = static_cast<int64_t>(block_id()) * block_threads() + thread_id();
  const int64_t threads = static_cast<int64_t>(block_count()) * block_threads();
  for (int64_t slot = first; slot < p.slots; slot += threads)
    if (const int row = below(p.rows, load_readonly(p.inverse + slot)); row >= 0) store(p.sorted + row, load_readonly(p.weights + slot));
  for (int64_t row = first; row < p.rows; row += threads)
    if (load_readonly(p.gather + row) < 0) store(p.sorted + row, 0.0f);
}

}  // namespace moe

PTX_KERNEL(sort_weights, 128, 8, 0, moe::sort_weights, moe::SortWeightsParams)
PTX_KERNEL(permute_f32, 128, 8, 0, moe::permute, moe::PermuteParams<float>)
PTX_KERNEL(permute_bf16, 128, 8, 0, moe::permute, moe::PermuteParams<ptx::bf16>)
PTX_KERNEL(permute_f16, 128, 8, 0, moe::permute, moe::PermuteParams<ptx::f16>)
PTX_KERNEL(unpermute_grad_f32, 128, 8, 0, moe::unpermute_grad, moe::UnpermuteGradParams<float>)
PTX_KERNEL(unpermute_grad_bf16, 128, 8, 0, moe::unpermute_grad, moe::UnpermuteGradParams<ptx::bf16>)
PTX_KERNEL(unpermute_grad_f16, 128, 8, 0, moe::unpermute_grad, moe::UnpermuteGradParams<ptx::f16>)
