// The gradients of weights against float64.
#include "kernels/sm80_grad_weight.cu"
#include "kernels/sm90_grad_weight.cu"
#include "tests/pairs.h"

using namespace test;

namespace {

// What a gradient is added to: numbers, and here and there a zero whose sign adding 0 would lose.
template <class T> Buffer<T> numbers(const char* name, int64_t count, int64_t skip) {
  auto buffer = scratch<T>(name, count, T{}, skip);
  for (T& value : buffer.values()) value = make<T>(chance(5) ? -0.0f : normal());
  return buffer;
}

template <class Math> void check_grad_weight(const Entry& entry) {
  using T = ElementOf<Math>;
  const bool gather_a = entry.variant != "b" && chance(2), gather_b = entry.variant != "a" && chance(2);
  const int M = entry.size<T>(any_of({1, 40, entry.BM - 1, entry.BM + 30, 2 * entry.BM + 5})), N = entry.width<T>();
  const SortedRows rows = some_rows(static_cast<int64_t>(M) * N / 4);
  const int64_t size = static_cast<int64_t>(M) * N;

  const auto a = rows.input_rows<T>("a", M, gather_a, entry.skip()), b = rows.input_rows<T>("b", N, gather_b, entry.skip());
  const auto gather = rows.gather_input(), offsets = rows.offsets_input();
  GradWeightParams<T> p{a, b, nullptr, nullptr, offsets, nullptr, nullptr, 0, rows.tokens, rows.rows, M, N, rows.experts()};
  if (gather_a) p.gather_a = gather;
  if (gather_b) p.gather_b = gather;

  const std::vector<int> none;
  const auto left = operand(a, M, gather_a ? rows.gather : none), right = operand(b, N, gather_b ? rows.gather : none);
  const auto want = [&](int64_t i) {
    const int64_t e = i / size, m = i % size / N, n = i % N;
    Sum products;
    for (int row = std::min(rows.offsets[e], rows.rows); row < std::min(rows.offsets[e + 1], rows.rows); row++)
      products.add(left[row][m] * right[row][n]);
    return products.near(entry.tf32());
  };
  ptx::TensorMap map{};
  const auto run = [&] {
    const bool exchanged = entry.warpgroups() && entry.variant == "b";
    if (exchanged) std::swap(p.a, p.b), std::swap(p.gather_a, p.gather_b), std::swap(p.m, p.n);
    launch_product(entry, p, [&](auto& maps) {
      maps.b = exchanged ? map_of(a, M, p.rows, 1) : map_of(b, N, p.rows, 1);
      maps.out[0] = map;
    });
  };
  const auto check_added = [&](const auto& sum) {
    const auto values = sum.values();
    const std::vector before(values.begin(), values.end());
    run();
    expect_all_near(sum, [&](int64_t i) { return want(i) + Near{real(before[i])}; });
    for (int64_t i = 0; i < sum.size(); i++)
      if (rows.offsets[i / size] == rows.offsets[i / size + 1])
        expect(!memcmp(&sum[i], &before[i], sizeof sum[i]), "an expert without rows keeps its bits");
  };
  const int64_t all = rows.experts() * size;
  switch (uniform(0, 2)) {
    case 0: {
      const auto out = output<T>("out", all, entry.skip());
      p.out = out;
      if (entry.warpgroups()) map = map_of(out, N, M, p.experts, entry.variant == "b" ? 64 : 16);
      run();
      return expect_near(out, want);
    }
    case 1: {
      const auto sum = numbers<float>("sum", all, entry.skip());
      p.sum = sum;
      return check_added(sum);
    }
    default: {
      const auto out = numbers<T>("out", all, entry.skip());
      p.out = out, p.adds = 1;
      return check_added(out);
    }
  }
}

const bool entries = test_entries("grad_weight", []<class Math>(const Entry& entry) { check_grad_weight<Math>(entry); });

}  // namespace

// Tokens that lie more than 2^32 elements behind the first.
TEST(grad_weight_last_tokens_beyond_32_bits) {
  constexpr int rows = 3, tokens = (1 << 20) + rows, M = 8, N = 4096;
  const auto a = input<bf16>("a", rows * M, [](int64_t) { return normal(); });
  const auto b = vast<bf16>("b", int64_t{tokens} * N, rows * N, [](int64_t) { return normal(); });
  const auto gather = input<int>("gather", rows, [](int64_t i) { return tokens - rows + i; });
  const auto offsets = input<int>("offsets", 2, [](int64_t e) { return e * rows; });
  const auto out = output<bf16>("out", M * N);
  launch("grad_weight_bf16_128x128_b", 2, GradWeightParams<bf16>{a, b, nullptr, gather, offsets, out, nullptr, 0, tokens, rows, M, N, 1});
  const auto left = reals(a), right = reals(b.values().last(rows * N));
  expect_near(out, [&](int64_t i) {
    Sum sum;
    for (int row = 0; row < rows; row++) sum.add(left[row * M + i / N] * right[row * N + i % N]);
    return sum.near();
  });
}
