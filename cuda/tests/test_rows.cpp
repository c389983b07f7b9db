// Moving and adding rows: combine, permute, and the gradients of combine.
#include "kernels/combine.cu"
#include "kernels/permute.cu"
#include "tests/plans.h"

using namespace moe;
using test::any_of;
using test::chance;
using test::real;

namespace {

// Columns with and without whole 16 bytes, and more than one warp's share of them.
int some_columns() { return static_cast<int>(chance(2) ? uniform(1, 70) * 8 : uniform(1, 300)); }

template <class T> test::Buffer<T> some_rows(const char* name, int64_t count) {
  return input<T>(name, count, [](int64_t) { return normal(); }, chance(4));
}

template <class T> void check_combine(const char* kernel) {
  const auto plan = test::some_plan(static_cast<int>(uniform(0, 12)), static_cast<int>(uniform(1, 9)), any_of({1, 2, 3, 4, 8, 35}));
  const int H = some_columns();
  const bool weighted = chance(2);
  const auto y = some_rows<T>("y", static_cast<int64_t>(plan.N) * H);
  const auto inverse = plan.input_of("inverse", plan.inverse);
  const auto weights = plan.input_of("weights", plan.weights);
  const auto out = output<T>("out", static_cast<int64_t>(plan.T) * H);
  launch(kernel, uniform(1, 4), CombineParams<T>{y, inverse, weighted ? Global<const float>(weights) : nullptr, out, plan.T, plan.K, plan.N, H});
  expect_equal(out, [&](int64_t i) {
    float total = 0;
    for (int k = 0; k < plan.K; k++) {
      const int64_t slot = i / H * plan.K + k, row = plan.inverse[slot];
      if (row >= 0) total += (weighted ? plan.weights[slot] : 1.0f) * to_float(y[row * H + i % H]);
    }
    return from_float<T>(total);
  });
}

template <class T> void check_permute(const char* kernel) {
  const auto plan = test::some_plan(static_cast<int>(uniform(1, 12)), static_cast<int>(uniform(1, 9)), any_of({1, 2, 3}));
  const int H = some_columns();
  const auto x = some_rows<T>("x", static_cast<int64_t>(plan.T) * H);
  const auto gather = plan.input_of("gather", plan.gather);
  const auto out = output<T>("out", static_cast<int64_t>(plan.N) * H);
  launch(kernel, uniform(1, 4), PermuteParams<T>{x, gather, out, plan.T, plan.N, H});
  expect_equal(out, [&](int64_t i) {
    const int64_t token = plan.gather[i / H];
    return token < 0 ? from_float<T>(0.0f) : x[token * H + i % H];
  });
}

template <class T> void check_unpermute_grad(const char* kernel) {
  const auto plan = test::some_plan(static_cast<int>(uniform(1, 12)), static_cast<int>(uniform(1, 9)), any_of({1, 2, 3}));
  const int H = some_columns();
  const bool weighted = !chance(4);
  const auto grad_out = some_rows<T>("grad_out", static_cast<int64_t>(plan.T) * H);
  const auto y = some_rows<T>("y", static_cast<int64_t>(plan.N) * H);
  const auto gather = plan.input_of("gather", plan.gather), inverse = plan.input_of("inverse", plan.inverse);
  const auto weights = plan.input_of("weights", plan.weights);
  const auto grad_y = output<T>("grad_y", static_cast<int64_t>(plan.N) * H);
  const auto grad_weights = output<float>("grad_weights", plan.T * plan.K);
  const int64_t wanted = uniform(1, 3);
  UnpermuteGradParams<T> p{grad_out, y, gather, inverse, weights, grad_y, grad_weights, plan.T, plan.K, plan.N, H};
  if (!weighted) p.weights = nullptr;
  if (!(wanted & 1)) p.grad_y = nullptr;
  if (!(wanted & 2)) p.grad_weights = nullptr, p.y = chance(2) ? nullptr : p.y;
  launch(kernel, uniform(1, 4), p);
  std::vector<int> slot_of(plan.N, -1);
  for (int i = 0; i < plan.T * plan.K; i++)
    if (plan.inverse[i] >= 0) slot_of[plan.inverse[i]] = i;
  if (p.grad_y)
    expect_equal(grad_y, [&](int64_t i) {
      const int64_t slot = slot_of[i / H];
      if (slot < 0) return from_float<T>(0.0f);
      return from_float<T>(0.0f + (weighted ? plan.weights[slot] : 1.0f) * to_float(grad_out[slot / plan.K * H + i % H]));
    });
  if (!p.grad_weights) return;
  const auto dot = [&](int64_t slot, bool absolute) {
    double sum = 0;
    for (int h = 0; plan.inverse[slot] >= 0 && h < H; h++) {
      const double term = real(grad_out[slot / plan.K * H + h]) * real(y[static_cast<int64_t>(plan.inverse[slot]) * H + h]);
      sum += absolute ? std::fabs(term) : term;
    }
    return sum;
  };
  expect_close(grad_weights, [&](int64_t i) { return dot(i, false); }, [&](int64_t i) { return sum_bound<float>(0, dot(i, true), H); });
}

}  // namespace

TEST(combine_f32) { for (int i = 0; i < 5; i++) check_combine<float>("combine_f32"); }
TEST(combine_bf16) { for (int i = 0; i < 5; i++) check_combine<bf16>("combine_bf16"); }
TEST(combine_f16) { for (int i = 0; i < 3; i++) check_combine<f16>("combine_f16"); }
TEST(permute_f32) { for (int i = 0; i < 5; i++) check_permute<float>("permute_f32"); }
TEST(permute_bf16) { for (int i = 0; i < 5; i++) check_permute<bf16>("permute_bf16"); }
TEST(permute_f16) { for (int i = 0; i < 3; i++) check_permute<f16>("permute_f16"); }
TEST(unpermute_grad_f32) { for (int i = 0; i < 5; i++) check_unpermute_grad<float>("unpermute_grad_f32"); }
TEST(unpermute_grad_bf16) { for (int i = 0; i < 5; i++) check_unpermute_grad<bf16>("unpermute_grad_bf16"); }
TEST(unpermute_grad_f16) { for (int i = 0; i < 3; i++) check_unpermute_grad<f16>("unpermute_grad_f16"); }

// Rows that lie more than 2^32 elements behind the first: the last ones, and a zero in front of them.
TEST(rows_beyond_32_bits) {
  constexpr int count = 2, rows = (1 << 20) + count, H = 4096;
  const auto far = vast<bf16>("rows", int64_t{rows} * H, count * H, [](int64_t) { return normal(); });
  const auto last = far.values().last(count * H);
  const auto index = input<int>("index", count, [](int64_t i) { return rows - count + i; });
  const auto out = output<bf16>("out", count * H), copies = output<bf16>("copies", count * H);
  launch("combine_bf16", 2, CombineParams<bf16>{far, index, nullptr, out, count, 1, rows, H});
  launch("permute_bf16", 2, PermuteParams<bf16>{far, index, copies, rows, count, H});
  for (const auto& got : {std::cref(out), std::cref(copies)}) expect_equal(got.get(), [&](int64_t i) { return last[i]; });
  const auto ones = input<bf16>("grad_out", count * H, [](int64_t) { return 1; });
  const auto dots = output<float>("grad_weights", count);
  launch("unpermute_grad_bf16", 2, UnpermuteGradParams<bf16>{ones, far, nullptr, index, nullptr, nullptr, dots, count, 1, rows, H});
  expect_close(dots, [&](int64_t i) {
    double sum = 0;
    for (int h = 0; h < H; h++) sum += real(last[i * H + h]);
    return sum;
  }, [](int64_t) { return 1e-2; });
}
