// Bias gradients: out[e] = sum over the sorted rows r of expert e of scale[r] * rows[gather[r]].
//
// db1 sums dH as it lies; db2 sums the gradient of the output, gathered and scaled by the routing weights. E experts,
// N sorted rows, C columns, S splits. Each split of an expert's rows is summed in order, then the splits are: the
// launching side picks S from N / E, and S = 1 needs neither `partial` nor grad_bias_sum.
#include "tile/rows.cuh"
#include "tile/walk.cuh"

namespace moe {

template <class T> struct GradBiasParams {
  Global<const T> rows;        // [N, C], or [T, C] with gather
  Global<const int> gather;    // [N] row of each sorted row, -1: adds nothing; null: row r itself
  Global<const float> scale;   // [N]; null: ones
  Global<const int> offsets;   // [E + 1]
  Global<float> partial;       // [S, E, C]; null where S is 1
  Global<T> out;               // [E, C], zeros for an expert without rows
  int experts, sorted, sources, columns, splits;  // E, N, rows of `rows`, C, S
};

template <int N, class T> PTX_D void grad_bias_part(const GradBiasParams<T>& p, int64_t item, int part) {
  const int expert = static_cast<int>(item / p.splits), split = static_cast<int>(item % p.splits);
  const int begin = tile::row_offset(p.offsets, expert, p.sorted);
  const int64_t rows = tile::row_offset(p.offsets, expert + 1, p.sorted) - begin;
  const int first = begin + static_cast<int>(rows * split / p.splits);
  const int end = begin + static_cast<int>(rows * (split + 1) / p.splits) - (BUG(bias_last_row) && split + 1 == p.splits);
  const int column = (part * 32 + lane()) * N;
  auto total = Sums<N>::zeros();
  for (int row = first; row < end; row += 32) {
    const int count = end - row < 32 ? end - row : 32;
    int source = row + lane();
    float scale = 1.0f;
    if (lane() < count && p.scale) scale = load_readonly(p.scale + source);
    if (p.gather) source = lane() < count ? below(p.sources, load_readonly(p.gather + source)) : -1;
    add_rows(total, p.rows, p.columns, column, source, scale, count);
  }
  if (column >= p.columns) return;
  if (p.splits == 1) {
    total.store(p.out + (static_cast<int64_t>(expert) * p.columns + column));
    return;
  }
  const int64_t at = (static_cast<int64_t>(split) * p.experts + expert) * p.columns + column;
#pragma unroll
  for (int i = 0; i < N; i++) store(p.partial + (at + i), total.at[i]);
}

template <class T> PTX_D void grad_bias(const GradBiasParams<T>& p) {
  const int64_t items = static_cast<int64_t>(p.experts) * p.splits;
  if (rows_are_wide<T>(p.columns, p.rows) && rows_are_wide<T>(p.columns, p.out))
    for_each_part(items, parts_of<WIDE<T>>(p.columns), [&](int64_t i, int part) { grad_bias_part<WIDE<T>>(p, i, part); });
  else
    for_each_part(items, parts_of<1>(p.columns), [&](int64_t i, int part) { grad_bias_part<1>(p, i, part); });
}

// out = sum over the splits of partial.
template <class T> PTX_D void grad_bias_sum(const GradBiasParams<T>& p) {
  const int64_t size = static_cast<int64_t>(p.experts) * p.columns;
  const int64_t threads = static_cast<int64_t>(block_count()) * block_threads();
  for (int64_t i = static_cast<int64_t>(block_id()) * block_threads() + thread_id(); i < size; i += threads) {
    float total = 0.0f;
    for (int split = BUG(bias_first_split); split < p.splits; split++) total = add_rn(total, load(p.partial + (split * size + i)));
    store(p.out + i, from_float<T>(total));
  }
}

}  // namespace moe

PTX_KERNEL(grad_bias_f32, 128, 7, 0, moe::grad_bias, moe::GradBiasParams<float>)
PTX_KERNEL(grad_bias_bf16, 128, 7, 0, moe::grad_bias, moe::GradBiasParams<ptx::bf16>)
PTX_KERNEL(grad_bias_f16, 128, 7, 0, moe::grad_bias, moe::GradBiasParams<ptx::f16>)
PTX_KERNEL(grad_bias_sum_f32, 128, 8, 0, moe::grad_bias_sum, moe::GradBiasParams<float>)
PTX_KERNEL(grad_bias_sum_bf16, 128, 8, 0, moe::grad_bias_sum, moe::GradBiasParams<ptx::bf16>)
PTX_KERNEL(grad_bias_sum_f16, 128, 8, 0, moe::grad_bias_sum, moe::GradBiasParams<ptx::f16>)
