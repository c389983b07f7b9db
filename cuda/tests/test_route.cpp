// The router kernels: equal to fastmoe-core to the bit, and its gradient against float64.
#include "kernels/grad_route.cu"
#include "kernels/route.cu"
#include "tests/plans.h"

using namespace moe;
using test::any_of;
using test::chance;

namespace {

// The same number; two NaN are the same whatever their bits.
void expect_same(const test::Buffer<float>& got, const std::vector<float>& want, test::Where where = test::Where::current()) {
  for (int64_t i = 0; i < got.size(); i++)
    if (float_bits(got[i]) != float_bits(want[i]) && !(std::isnan(got[i]) && std::isnan(want[i])))
      test::failed(std::string(got.name()) + '[' + std::to_string(i) + "] is " + std::to_string(got[i]) + ", not " +
                   std::to_string(want[i]), where);
}

// Logits of one of several kinds: plain, full of ties, full of what is no ordinary number.
std::function<float()> some_logits() {
  const int64_t kind = uniform(0, 3);
  const float spread = any_of({0.1f, 1.0f, 30.0f});
  return [=] {
    if (kind == 1) return static_cast<float>(uniform(-2, 2));
    if (kind == 2 && chance(4)) return any_of({INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e-40f, 88.5f, -88.0f, 3e38f});
    if (kind == 3 && chance(2)) return any_of({-INFINITY, -0.0f, 0.0f});
    return normal() * spread;
  };
}

// The rules of a router that fit E experts.
template <class Params> void some_rules(Params& p, int experts) {
  p.experts = experts;
  p.score = static_cast<int>(uniform(0, 2));
  p.order = static_cast<int>(uniform(0, 1));
  p.renormalize = static_cast<int>(uniform(0, 1));
  p.eps = any_of({0.0f, 1e-20f, 1e-6f});
  p.scale = any_of({1.0f, 2.5f});
  p.softcap = chance(3) ? any_of({1.0f, 30.0f}) : 0.0f;
}

void some_groups(int experts, int& n_group, int& topk_group, int& group_score, int& most) {
  std::vector<int> divisors;
  for (int n = 1; n <= experts; n++)
    if (experts % n == 0) divisors.push_back(n);
  n_group = divisors[uniform(0, divisors.size() - 1)];
  topk_group = static_cast<int>(uniform(1, n_group));
  group_score = experts / n_group < 2 ? GROUP_MAX : static_cast<int>(uniform(0, 1));
  most = topk_group * (experts / n_group);
}

template <class T> void check_route(const char* kernel, int experts, int most_k, bool groups) {
  RouteParams<T> p{};
  some_rules(p, experts);
  p.tokens = static_cast<int>(uniform(1, 9));
  int most = experts;
  if (groups) some_groups(experts, p.n_group, p.topk_group, p.group_score, most);
  p.group_losers = static_cast<int>(uniform(0, 1));
  p.top_k = static_cast<int>(uniform(1, std::min(most, most_k)));

  const int64_t te = static_cast<int64_t>(p.tokens) * experts, tk = static_cast<int64_t>(p.tokens) * p.top_k;
  const auto logit = some_logits();
  const auto logits = input<T>("logits", te, [&](int64_t) { return logit(); });
  const auto bias = input<float>("bias", experts, [&](int64_t) { return chance(3) ? 0.0f : normal(); });
  const auto expert_scale = input<float>("expert_scale", experts, [&](int64_t) { return normal(); });
  const auto ids = output<int64_t>("ids", tk);
  const auto weights = output<float>("weights", tk);
  const auto scores = output<float>("scores", te);
  const auto bad = scratch<int>("bad_token", 1, INT32_MAX);
  p.logits = logits;
  p.bias = chance(2) ? Global<const float>(bias) : nullptr;
  p.expert_scale = chance(4) ? Global<const float>(expert_scale) : nullptr;
  p.ids = ids, p.weights = weights, p.scores = scores;
  p.bad_token = chance(4) ? Global<int>(nullptr) : Global<int>(bad);
  launch(kernel, uniform(1, 3), p);

  std::vector<float> wide(te), want_weights(tk), want_scores(te);
  std::vector<int64_t> want_ids(tk);
  for (int64_t i = 0; i < te; i++) wide[i] = to_float(logits[i]);
  oracle::oracle_route({p.tokens, p.experts, p.top_k, p.score, p.order, p.renormalize, p.eps, p.scale, p.softcap, p.n_group,
                p.topk_group, p.group_score, p.group_losers, wide.data(), p.bias.host_address(),
                p.expert_scale.host_address(), want_ids.data(), want_weights.data(), want_scores.data()});
  expect_same(scores, want_scores);
  expect_equal(ids, [&](int64_t i) { return want_ids[i]; });
  expect_same(weights, want_weights);
  int first_bad = INT32_MAX;
  for (int64_t i = te - 1; i >= 0 && p.bad_token; i--)
    if (std::isnan(wide[i])) first_bad = static_cast<int>(i / experts);
  expect(bad[0] == first_bad, "bad_token is " + std::to_string(bad[0]) + ", not " + std::to_string(first_bad));
}

template <class T> void check_routes(const char* kernel) {
  for (int i = 0; i < 12; i++) check_route<T>(kernel, static_cast<int>(uniform(1, 140)), any_of({1, 8, 20, 140}), chance(3));
}

}  // namespace

TEST(route_f32) { check_routes<float>("route_f32"); }
TEST(route_bf16) { check_routes<bf16>("route_bf16"); }
TEST(route_f16) { check_routes<f16>("route_f16"); }
TEST(route_of_models) {
  for (int experts : {8, 60, 64, 128, 160, 256, 384, 512}) check_route<bf16>("route_bf16", experts, 10, false);
  for (int experts : {64, 160, 256}) check_route<bf16>("route_bf16", experts, 8, true);
}
TEST(route_many_experts) {
  check_route<float>("route_f32", any_of({1023, 1024, 1025, 1100}), 36, false);
  check_route<float>("route_f32", any_of({512, 900, 1024}), 36, true);
}
TEST(route_no_tokens) {
  const auto none = output<float>("none", 0);
  RouteParams<float> p{};
  p.scores = p.weights = none;
  p.experts = 4, p.top_k = 2;
  launch("route_f32", 1, p);
}

namespace {

// The gradient in float64, by the chain rule written out over dense vectors.
template <class T> void check_grad_route(const char* kernel) {
  GradRouteParams<T> p{};
  const int E = static_cast<int>(uniform(1, 100)), K = static_cast<int>(uniform(1, std::min(E, any_of({1, 8, 50}))));
  const int tokens = static_cast<int>(uniform(1, 6));
  some_rules(p, E);
  p.tokens = tokens, p.top_k = K;
  if (p.eps == 0.0f) p.eps = 1e-6f;
  const int64_t te = static_cast<int64_t>(tokens) * E, tk = static_cast<int64_t>(tokens) * K;
  const auto logits = input<T>("logits", te, [](int64_t) { return normal(); });
  std::vector<int64_t> chosen;
  for (int t = 0; t < tokens; t++) {
    std::vector<int64_t> order(E);
    for (int e = 0; e < E; e++) order[e] = e;
    std::shuffle(order.begin(), order.end(), test::random());
    chosen.insert(chosen.end(), order.begin(), order.begin() + K);
  }
  const bool strays = chance(3);
  for (auto& id : chosen)
    if (strays && chance(4)) id = any_of<int64_t>({-1, E, int64_t{1} << 32, INT64_MIN});
  const auto real = [&](int64_t id) { return id >= 0 && id < E; };
  // Capped logits, their slope, and scores, in float64.
  std::vector<double> x(te), slope(te, 1.0), score(te);
  const auto softmax = [](const std::vector<double>& v) {
    std::vector<double> y(v.size());
    double sum = 0;
    for (double a : v) sum += std::exp(a);
    for (size_t i = 0; i < v.size(); i++) y[i] = std::exp(v[i]) / sum;
    return y;
  };
  for (int64_t i = 0; i < te; i++) {
    x[i] = test::real(logits[i]);
    if (p.softcap == 0.0f) continue;
    const double unit = std::tanh(x[i] / p.softcap);
    x[i] = unit * p.softcap, slope[i] = 1 - unit * unit;
  }
  for (int t = 0; t < tokens; t++) {
    const auto all = softmax({x.begin() + t * E, x.begin() + (t + 1) * E});
    for (int e = 0; e < E; e++) {
      const double a = x[t * E + e];
      score[t * E + e] = p.score == SOFTMAX ? all[e] : p.score == SIGMOID ? 1 / (1 + std::exp(-a)) : std::sqrt(std::log1p(std::exp(a)));
    }
  }
  const auto ids = input<int64_t>("ids", tk, [&](int64_t i) { return chosen[i]; });
  const auto scores = input<float>("scores", te, [&](int64_t i) { return score[i]; });
  const auto expert_scale = input<float>("expert_scale", E, [](int64_t) { return normal(); });
  const auto grad_weights = input<float>("grad_weights", tk, [](int64_t) { return normal(); });
  const auto grad_scores = input<float>("grad_scores", te, [](int64_t) { return normal(); });
  const auto grad_logits = output<T>("grad_logits", te);
  const auto by_choice = output<float>("by_choice", tk);
  p.logits = logits, p.ids = ids, p.scores = scores, p.grad_logits = grad_logits;
  if (chance(2)) p.expert_scale = expert_scale, p.by_choice = by_choice;
  if (!chance(4)) p.grad_weights = grad_weights;
  if (!chance(3)) p.grad_scores = grad_scores;
  launch(kernel, uniform(1, 2), p);

  std::vector<double> want(te), size(te), by_expert(E), by_expert_size(E);
  for (int t = 0; t < tokens; t++) {
    std::vector<double> picked(K), g(K), by_score(E), by_logit(E);
    for (int k = 0; k < K; k++) picked[k] = real(ids[t * K + k]) ? x[t * E + ids[t * K + k]] : -INFINITY;
    const bool own = p.order == TOPK_SCORE && p.score == SOFTMAX;
    if (own) picked = softmax(picked);
    double total = p.eps, dot = 0, inner = 0;
    for (int k = 0; k < K; k++) {
      const int64_t e = ids[t * K + k];
      if (!real(e)) {
        picked[k] = 0;
        continue;
      }
      if (!own) picked[k] = score[t * E + e];
      g[k] = p.grad_weights ? static_cast<double>(grad_weights[t * K + k]) * p.scale * (p.expert_scale ? expert_scale[e] : 1) : 0;
      total += picked[k], dot += g[k] * picked[k];
    }
    for (int k = 0; k < K; k++) {
      const int64_t e = ids[t * K + k];
      if (!real(e)) continue;
      const double part = p.expert_scale && p.grad_weights ? static_cast<double>(grad_weights[t * K + k]) * p.scale * picked[k] / (p.renormalize ? total : 1) : 0;
      by_expert[e] += part, by_expert_size[e] += std::fabs(part);
    }
    for (int k = 0; k < K && p.renormalize; k++)
      if (real(ids[t * K + k])) g[k] = (g[k] - dot / total) / total;
    for (int k = 0; k < K; k++) inner += g[k] * picked[k];
    for (int k = 0; k < K; k++) {
      const int64_t e = ids[t * K + k];
      if (!real(e)) continue;
      if (own) by_logit[e] = picked[k] * (g[k] - inner);
      else by_score[e] = g[k];
    }
    double all = 0;
    for (int e = 0; e < E; e++) {
      if (p.grad_scores) by_score[e] += grad_scores[t * E + e];
      all += by_score[e] * score[t * E + e];
    }
    for (int e = 0; e < E; e++) {
      const double s = score[t * E + e], a = x[t * E + e];
      const double d = p.score == SOFTMAX   ? s * (by_score[e] - all)
                       : p.score == SIGMOID ? by_score[e] * s * (1 - s)
                                            : by_score[e] / (1 + std::exp(-a)) / (2 * s);
      want[t * E + e] = (d + by_logit[e]) * slope[t * E + e];
      size[t * E + e] = std::fabs(by_score[e]) + std::fabs(by_logit[e]) + std::fabs(all) + std::fabs(inner) + std::fabs(dot) / total;
    }
  }
  // A few float32 operations more than the sums of K and E terms, each of the size of what they add.
  const double steps = (E + K + 20) * 0x1p-23;
  expect_close(grad_logits, [&](int64_t i) { return want[i]; },
               [&](int64_t i) { return std::fabs(want[i]) * test::rounding<T>() + steps * (1 + size[i]); });
  if (!p.by_choice) return;
  const auto of_choices = input<float>("by_choice", tk, [&](int64_t i) { return by_choice[i]; });
  const auto grad_expert_scale = output<float>("grad_expert_scale", E);
  launch("grad_expert_scale", uniform(1, E), GradExpertScaleParams{ids, of_choices, grad_expert_scale, tokens * K, E});
  expect_close(grad_expert_scale, [&](int64_t e) { return by_expert[e]; }, [&](int64_t e) { return steps * by_expert_size[e]; });
}

}  // namespace

TEST(grad_route_f32) { for (int i = 0; i < 6; i++) check_grad_route<float>("grad_route_f32"); }
TEST(grad_route_bf16) { for (int i = 0; i < 3; i++) check_grad_route<bf16>("grad_route_bf16"); }
TEST(grad_route_f16) { for (int i = 0; i < 3; i++) check_grad_route<f16>("grad_route_f16"); }
