// The grouped product over sorted rows against float64.
#include "kernels/sm80_grouped_gemm.cu"
#include "kernels/sm90_grouped_gemm.cu"
#include "tests/pairs.h"

using namespace test;

namespace {

template <class Math> void check_gemm(const Entry& entry, const SortedRows& rows, int N, int K) {
  using T = ElementOf<Math>;
  const bool transposed = entry.any() ? chance(2) : entry.variant == "nn", biased = chance(2);
  const auto a = rows.input_rows<T>("a", K, false, entry.skip());
  const auto offsets = rows.offsets_input();
  const auto w = rows.of_experts<T>("w", static_cast<int64_t>(N) * K, entry.skip());
  const auto bias = rows.of_experts<T>("bias", N, entry.skip());
  const auto y = output<T>("y", static_cast<int64_t>(rows.rows) * N, entry.skip());
  GemmParams<T> p{a, offsets, w, bias, y, rows.rows, K, N, rows.experts(), transposed};
  if (!biased) p.bias = nullptr;
  launch_product(entry, p, [&](auto& maps) {
    maps.a = map_of(a, K, p.rows, 1);
    maps.b = map_of_weights(w, N, K, p.experts, transposed);
    maps.out[0] = map_of_results(y, N, p.rows);
  });

  const auto left = operand(a, K, {});
  const Weights right{reals(w), N, K, transposed};
  expect_near(y, [&](int64_t i) {
    const int row = static_cast<int>(i / N), c = static_cast<int>(i % N), e = rows.expert(row);
    if (e == rows.experts()) return Near{};
    return right.product(left[row], e, c, biased ? real(bias[int64_t{e} * N + c]) : 0, entry.tf32());
  });
}

// Weights that lie more than 2^32 elements behind the first.
void check_last_expert(const char* name, bool transposed) {
  constexpr int rows = 3, N = 128, K = 4096, E = (1 << 13) + 3;
  constexpr int64_t size = int64_t{N} * K;
  const auto a = input<bf16>("a", rows * K, [](int64_t) { return normal(); });
  const auto offsets = input<int>("offsets", E + 1, [](int64_t e) { return e < E ? 0 : rows; });
  const auto w = vast<bf16>("w", E * size, size, [](int64_t) { return normal(); });
  const auto y = output<bf16>("y", rows * N);
  launch(name, 1, GemmParams<bf16>{a, offsets, w, nullptr, y, rows, K, N, E, transposed});
  const auto left = operand(a, K, {});
  const Weights right{reals(w.values().last(size)), N, K, transposed};
  expect_near(y, [&](int64_t i) { return right.product(left[static_cast<int>(i / N)], 0, static_cast<int>(i % N), 0, false); });
}

const bool entries = test_entries("gemm", []<class Math>(const Entry& entry) {
  using T = ElementOf<Math>;
  const int N = entry.width<T>(), K = entry.depth<T>();
  check_gemm<Math>(entry, some_rows(int64_t{N} * K), N, K);
});

}  // namespace

// More tiles along m than a band of the walk has, and many a block.
TEST(gemm_walks_in_bands) {
  SortedRows rows;
  rows.offsets = {0, 130, 130, 130 + 1200};
  rows.rows = 1340;
  check_gemm<bf16>({"gemm_bf16_64x128_any", "bf16", "any", 64, 128}, rows, 300, 5);
}
// The offsets of a plan that does not belong to these rows.
TEST(gemm_offsets_beyond_the_rows) {
  SortedRows rows;
  rows.offsets = {0, 40, 1000, 2000};
  rows.rows = 70;
  check_gemm<bf16>({"gemm_bf16_128x128_nt", "bf16", "nt", 128, 128}, rows, 136, 72);
}
TEST(gemm_last_expert_beyond_32_bits) {
  check_last_expert("gemm_bf16_32x128_nt", false);
  check_last_expert("gemm_bf16_32x128_nn", true);
  check_last_expert("gemm_bf16_64x128_any", chance(2));
}
