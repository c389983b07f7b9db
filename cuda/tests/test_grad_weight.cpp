// The gradients of weights against float64.
#include "kernels/sm80_grad_weight.cu"
#include "tests/products.h"

using namespace test;

namespace {

template <class Math> void check_grad_weight(const Entry& entry) {
  using T = ElementOf<Math>;
  const bool gather_a = entry.variant != "b" && chance(2), gather_b = entry.variant != "a" && chance(2), add = chance(2);
  const int M = entry.size<T>(any_of({1, 40, entry.BM - 1, entry.BM + 30, 2 * entry.BM + 5})), N = entry.width<T>();
  const SortedRows rows = some_rows(static_cast<int64_t>(M) * N / 4);
  const int64_t size = static_cast<int64_t>(M) * N;

  const auto a = rows.input_rows<T>("a", M, gather_a, entry.skip()), b = rows.input_rows<T>("b", N, gather_b, entry.skip());
  const auto gather = rows.gather_input(), offsets = rows.offsets_input();
  const auto out = output<T>("out", rows.experts() * size, entry.skip());
  auto sum = scratch<float>("sum", rows.experts() * size, 0);
  for (float& value : sum.values()) value = normal();
  const std::vector<double> before = reals(sum);
  GradWeightParams<T> p{a, b, nullptr, nullptr, offsets, out, nullptr, rows.tokens, rows.rows, M, N, rows.experts()};
  if (gather_a) p.gather_a = gather;
  if (gather_b) p.gather_b = gather;
  if (add) p.sum = sum, p.out = nullptr;
  launch(entry.name.c_str(), uniform(1, 3), p);

  const std::vector<int> none;
  const auto left = operand(a, M, gather_a ? rows.gather : none), right = operand(b, N, gather_b ? rows.gather : none);
  const auto want = [&](int64_t i) {
    const int64_t e = i / size, m = i % size / N, n = i % N;
    Sum products;
    for (int row = std::min(rows.offsets[e], rows.rows); row < std::min(rows.offsets[e + 1], rows.rows); row++)
      products.add(left[row][m] * right[row][n]);
    return products.near(entry.tf32());
  };
  if (add) expect_near(sum, [&](int64_t i) { return want(i) + Near{before[i]}; });
  else expect_near(out, want);
}

const bool entries = test_entries("grad_weight", []<class Math>(const Entry& entry) { check_grad_weight<Math>(entry); });

}  // namespace
