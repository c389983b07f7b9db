// Gradients that are sums over rows: of the biases, and of the routing weights.
#include "kernels/grad_bias.cu"
#include "kernels/grad_score.cu"
#include "tests/plans.h"

using namespace moe;
using test::any_of;
using test::chance;
using test::real;

namespace {

test::Plan rows_of_experts() {
  return test::some_plan(static_cast<int>(uniform(0, 90)), static_cast<int>(uniform(1, 9)), any_of({1, 2, 3}));
}

// db2, with gather and scale, or db1.
template <class T> void check_grad_bias(const std::string& type, bool gathered) {
  const auto plan = rows_of_experts();
  const int C = static_cast<int>(chance(2) ? uniform(1, 40) * 8 : uniform(1, 150));
  const int64_t sources = gathered ? plan.T : plan.N;
  const auto rows = input<T>("rows", sources * C, [](int64_t) { return normal(); });
  const auto gather = plan.input_of("gather", plan.gather), offsets = plan.input_of("offsets", plan.offsets);
  const auto scale = plan.input_of("scale", plan.sorted_weights);
  const auto out = output<T>("out", plan.E * C);
  const int splits = any_of({1, 1, 2, 5});
  const auto partial = scratch<float>("partial", splits == 1 ? 0 : static_cast<int64_t>(splits) * plan.E * C, NAN);
  GradBiasParams<T> p{rows, nullptr, nullptr, offsets, nullptr, out, plan.E, plan.N, static_cast<int>(sources), C, splits};
  if (gathered) p.gather = gather, p.scale = scale;
  if (splits > 1) p.partial = partial;
  launch(("grad_bias_" + type).c_str(), uniform(1, 5), p);
  if (splits > 1) launch(("grad_bias_sum_" + type).c_str(), uniform(1, 3), p);

  const auto sum = [&](int64_t i, bool absolute) {
    double total = 0;
    for (int r = plan.offsets[i / C]; r < plan.offsets[i / C + 1]; r++) {
      const int64_t source = gathered ? plan.gather[r] : r;
      if (source < 0) continue;
      const double term = (gathered ? plan.sorted_weights[r] : 1.0) * real(rows[source * C + i % C]);
      total += absolute ? std::fabs(term) : term;
    }
    return total;
  };
  if (splits > 1) {
    expect_close(out, [&](int64_t i) { return sum(i, false); }, [&](int64_t i) {
      return sum_bound<T>(sum(i, false), sum(i, true), plan.N) + (sizeof(T) == 2 ? 0x1p-25 : 0);  // f16's subnormals
    });
    return;
  }
  expect_equal(out, [&](int64_t i) {  // in the order of the CPU backend
    float total = 0;
    for (int r = plan.offsets[i / C]; r < plan.offsets[i / C + 1]; r++) {
      const int64_t source = gathered ? plan.gather[r] : r;
      if (source >= 0) total += to_float(rows[source * C + i % C]) * (gathered ? plan.sorted_weights[r] : 1.0f);
    }
    return from_float<T>(total);
  });
}

template <class T> void check_grad_score(const std::string& type) {
  const auto plan = rows_of_experts();
  const int H = static_cast<int>(chance(2) ? uniform(1, 40) * 8 : uniform(1, 150)), B = any_of({0, 1, 2, 7, 40});
  const bool biased = chance(2);
  const auto partial = input<float>("partial", plan.N * B, [](int64_t) { return normal(); });
  const auto inverse = plan.input_of("inverse", plan.inverse), offsets = plan.input_of("offsets", plan.offsets);
  const auto grad_out = input<T>("grad_out", plan.T * H, [](int64_t) { return normal(); });
  const auto b2 = input<T>("b2", plan.E * H, [](int64_t) { return normal(); });
  const auto grad_weights = output<float>("grad_weights", plan.T * plan.K);
  GradScoreParams<T> p{partial, inverse, nullptr, nullptr, nullptr, grad_weights, plan.T, plan.K, plan.N, plan.E, H, B};
  if (biased) p.grad_out = grad_out, p.b2 = b2, p.offsets = offsets;
  launch(("grad_score_" + type).c_str(), uniform(1, 4), p);
  const auto sum = [&](int64_t slot, bool absolute) {
    double total = 0;
    const auto add = [&](double term) { total += absolute ? std::fabs(term) : term; };
    const int64_t row = plan.inverse[slot];
    for (int i = 0; row >= 0 && i < B; i++) add(partial[row * B + i]);
    for (int h = 0; row >= 0 && biased && h < H; h++)
      add(real(grad_out[slot / plan.K * H + h]) * real(b2[plan.ids[slot] * H + h]));
    return total;
  };
  expect_close(grad_weights, [&](int64_t i) { return sum(i, false); }, [&](int64_t i) {
    return sum_bound<float>(0, sum(i, true), B + H);
  });
}

}  // namespace

TEST(grad_bias_f32) { for (int i = 0; i < 6; i++) check_grad_bias<float>("f32", i % 2); }
TEST(grad_bias_bf16) { for (int i = 0; i < 6; i++) check_grad_bias<bf16>("bf16", i % 2); }
TEST(grad_bias_f16) { for (int i = 0; i < 4; i++) check_grad_bias<f16>("f16", i % 2); }
TEST(grad_score_f32) { for (int i = 0; i < 6; i++) check_grad_score<float>("f32"); }
TEST(grad_score_bf16) { for (int i = 0; i < 6; i++) check_grad_score<bf16>("bf16"); }
TEST(grad_score_f16) { for (int i = 0; i < 4; i++) check_grad_score<f16>("f16"); }
