// The whole layer, router to combine and back, kernel after kernel as the CUDA backend launches them, against a layer in
// float64.
#include "tile/entries.cuh"

// Of the products a few entry points; the tests of each family have them all.
#undef ROW_ENTRIES
#undef WEIGHT_ENTRIES
#define ROW_ENTRIES(kernel, Params)                                 \
  ROW_TILE(kernel, Params, bf16, ptx::bf16, 128, 128, 64, 3, 2)     \
  ROW_TILE(kernel, Params, f32, float, 128, 128, 64, 3, 2)          \
  ROW_ANY(kernel, Params, f32, float)
#define WEIGHT_ENTRIES(kernel, Params)                              \
  WEIGHT_TILE(kernel, Params, bf16, ptx::bf16, 128, 128, 64, 3, 2)  \
  WEIGHT_TILE(kernel, Params, f32, float, 128, 128, 64, 3, 2)       \
  WEIGHT_ANY(kernel, Params, f32, float)

#include "kernels/combine.cu"
#include "kernels/grad_bias.cu"
#include "kernels/grad_route.cu"
#include "kernels/grad_score.cu"
#include "kernels/permute.cu"
#include "kernels/plan.cu"
#include "kernels/route.cu"
#include "kernels/sm80_grad_hidden.cu"
#include "kernels/sm80_grad_weight.cu"
#include "kernels/sm80_grouped_gemm.cu"
#include "kernels/sm80_up.cu"
#include "tests/products.h"

using namespace test;
using moe::CombineParams, moe::GradBiasParams, moe::GradRouteParams, moe::GradScoreParams, moe::PlanParams, moe::RouteParams, moe::SortWeightsParams;

namespace {

using Reals = std::vector<double>;

// Sizes, layouts and the activation.
struct Layer {
  int T, H, I, N, E, K;
  Reference act;
  bool interleaved, transposed;

  int64_t w1_at(int e, int c, int h) const { return int64_t{e} * N * H + (transposed ? h * N + c : c * H + h); }
  int64_t w2_at(int e, int h, int unit) const { return int64_t{e} * H * I + (transposed ? unit * H + h : h * I + unit); }
  int gate_at(int unit) const { return interleaved ? 2 * unit : unit; }
  int up_at(int unit) const { return interleaved ? 2 * unit + 1 : I + unit; }
};

struct Tensors { Reals x, w1, b1, w2, b2, logits, out; };  // and their gradients

// The output of a layer, whose choices `ids` are given as far as not dropped; and the gradients from that of its output.
std::pair<Tensors, Tensors> in_float64(const Layer& l, const Tensors& v, const Reals& grad, const Buffer<int64_t>& ids, const Buffer<int>& inverse) {
  Tensors y{v}, g{Reals(v.x.size()), Reals(v.w1.size()), Reals(v.b1.size()), Reals(v.w2.size()), Reals(v.b2.size()), Reals(v.logits.size()), {}};
  y.out.assign(v.x.size(), 0);
  for (int t = 0; t < l.T; t++) {
    const double *logits = &v.logits[t * l.E], *x = &v.x[t * l.H], *grad_out = &grad[t * l.H];
    Reals scores(l.E), grad_scores(l.E);
    double all = 0, chosen = 0, weighted = 0;
    for (int e = 0; e < l.E; e++) all += scores[e] = std::exp(logits[e]);
    for (double& score : scores) score /= all;
    for (int k = 0; k < l.K; k++) chosen += scores[ids[t * l.K + k]];
    for (int k = 0; k < l.K; k++) {
      if (inverse[t * l.K + k] < 0) continue;
      const int e = static_cast<int>(ids[t * l.K + k]);
      const double weight = scores[e] / chosen;
      Reals hidden(l.N), act(l.I), grad_hidden(l.N), row(l.H);
      for (int c = 0; c < l.N; c++) {
        hidden[c] = v.b1[e * l.N + c];
        for (int h = 0; h < l.H; h++) hidden[c] += x[h] * v.w1[l.w1_at(e, c, h)];
      }
      const auto up = [&](int unit) { return Near{l.act.gated() ? hidden[l.up_at(unit)] : 1}; };
      for (int unit = 0; unit < l.I; unit++) act[unit] = l.act({hidden[l.gate_at(unit)]}, up(unit)).value;
      double grad_weight = 0;
      for (int h = 0; h < l.H; h++) {
        row[h] = v.b2[e * l.H + h];
        for (int unit = 0; unit < l.I; unit++) row[h] += act[unit] * v.w2[l.w2_at(e, h, unit)];
        y.out[t * l.H + h] += weight * row[h];
        grad_weight += grad_out[h] * row[h];
        g.b2[e * l.H + h] += weight * grad_out[h];
        for (int unit = 0; unit < l.I; unit++) g.w2[l.w2_at(e, h, unit)] += weight * grad_out[h] * act[unit];
      }
      grad_scores[e] = grad_weight / chosen;
      weighted += grad_weight * weight;
      for (int unit = 0; unit < l.I; unit++) {
        double d = 0;
        for (int h = 0; h < l.H; h++) d += weight * grad_out[h] * v.w2[l.w2_at(e, h, unit)];
        const auto [value, slope] = l.act.at(hidden[l.gate_at(unit)]);
        grad_hidden[l.gate_at(unit)] = d * l.act.factor(up(unit)).value * slope.value;
        if (l.act.gated()) grad_hidden[l.up_at(unit)] = l.act.passes(up(unit).value) ? d * value.value : 0;
      }
      for (int c = 0; c < l.N; c++) {
        g.b1[e * l.N + c] += grad_hidden[c];
        for (int h = 0; h < l.H; h++) {
          g.w1[l.w1_at(e, c, h)] += grad_hidden[c] * x[h];
          g.x[t * l.H + h] += grad_hidden[c] * v.w1[l.w1_at(e, c, h)];
        }
      }
    }
    for (int k = 0; k < l.K; k++) grad_scores[ids[t * l.K + k]] -= weighted / chosen;
    double inner = 0;
    for (int e = 0; e < l.E; e++) inner += grad_scores[e] * scores[e];
    for (int e = 0; e < l.E; e++) g.logits[t * l.E + e] = scores[e] * (grad_scores[e] - inner);
  }
  return {y, g};
}

// Tensors between kernels are rounded to T, and sums have some hundred terms: a few units of the largest element.
template <class T> void expect_alike(const Buffer<T>& got, const Reals& want, double rounding) {
  double largest = 1;
  for (double value : want) largest = std::max(largest, std::fabs(value));
  expect_close(got, [&](int64_t i) { return want[i]; }, [&](int64_t) { return 32 * rounding * largest; });
}

// What one kernel writes and others read.
template <class T> Buffer<T> made(const char* name, int64_t count) {
  if constexpr (std::is_integral_v<T>) return scratch<T>(name, count, -1);
  else return scratch<T>(name, count, make<T>(NAN));
}

template <class T> void check_layer(const std::string& tile, int H, int I, tile::Kind kind) {
  const Reference act(kind);
  const Layer l{static_cast<int>(uniform(1, 90)), H, I, act.gated() ? 2 * I : I, static_cast<int>(uniform(3, 9)), any_of({1, 2, 3}),
                act, act.gated() && chance(2), chance(2)};
  const std::string type = sizeof(T) == 2 ? "bf16" : "f32";
  const int slots = l.T * l.K, rows = slots, runs = (I + 31) / 32;
  const auto random = [&](const char* name, int64_t count, double scale) {
    return input<T>(name, count, [&](int64_t) { return scale * normal(); });
  };
  const auto run = [&](const std::string& kernel, const auto& params) { launch(kernel.c_str(), uniform(1, 3), params); };
  const auto product = [&](const std::string& family, const char* variant) {
    return family + '_' + type + '_' + tile + '_' + (tile == "64x128" ? "any" : variant);
  };

  const auto x = random("x", l.T * H, 1), logits = random("logits", l.T * l.E, 1), grad_out = random("grad_out", l.T * H, 1);
  const auto w1 = random("w1", int64_t{l.E} * l.N * H, 1 / std::sqrt(H)), b1 = random("b1", l.E * l.N, 1);
  const auto w2 = random("w2", int64_t{l.E} * H * I, 1 / std::sqrt(I)), b2 = random("b2", l.E * H, 1);

  const auto ids = made<int64_t>("ids", slots);
  const auto weights = made<float>("weights", slots), scores = made<float>("scores", l.T * l.E);
  run("route_" + type, RouteParams<T>{logits, nullptr, nullptr, ids, weights, scores, nullptr, l.T, l.E, l.K, moe::SOFTMAX, moe::SCORE_TOPK,
                                      1, 0, 1, 0, 0, 0, 0, 0});

  const auto counts = made<int>("counts", l.E), offsets = made<int>("offsets", l.E + 1), gather = made<int>("gather", rows);
  const auto inverse = made<int>("inverse", slots), workspace = made<int>("workspace", (slots + 511) / 512 * l.E + l.E);
  const int capacity = chance(2) ? INT_MAX : 1 + slots / l.E;
  launch("plan_small_i64", 1, PlanParams<int64_t>{ids, nullptr, counts, offsets, gather, inverse, nullptr, nullptr, workspace, slots, l.K, l.E,
                                                  capacity, 0, 0});

  const auto hidden = made<T>("hidden", int64_t{rows} * l.N), activated = made<T>("act", int64_t{rows} * I), y = made<T>("y", int64_t{rows} * H);
  const auto out = made<T>("out", l.T * H);
  run(product("up", l.transposed ? "nn" : "nt"), UpParams<T>{x, gather, offsets, w1, b1, hidden, activated, l.T, rows, H, I, l.E,
                                                              static_cast<int>(kind), l.interleaved, l.transposed});
  run(product("gemm", l.transposed ? "nn" : "nt"), GemmParams<T>{activated, offsets, w2, b2, y, rows, I, H, l.E, l.transposed});
  run("combine_" + type, CombineParams<T>{y, inverse, weights, out, l.T, l.K, rows, H});

  const auto sorted_weights = made<float>("sorted_weights", rows), slopes = made<float>("slopes", int64_t{rows} * runs);
  const auto grad_hidden = made<T>("grad_hidden", int64_t{rows} * l.N), scaled_act = made<T>("scaled_act", int64_t{rows} * I);
  const auto grad_rows = made<T>("grad_rows", int64_t{rows} * H), grad_x = made<T>("grad_x", l.T * H);
  const auto grad_weights = made<float>("grad_weights", slots);
  const auto grad_w1 = made<T>("grad_w1", w1.size()), grad_b1 = made<T>("grad_b1", b1.size()), grad_w2 = made<T>("grad_w2", w2.size()),
             grad_b2 = made<T>("grad_b2", b2.size()), grad_logits = made<T>("grad_logits", logits.size());
  run("sort_weights", SortWeightsParams{weights, gather, inverse, sorted_weights, slots, rows});
  run(product("grad_hidden", l.transposed ? "nt" : "nn"),
      GradHiddenParams<T>{grad_out, gather, offsets, sorted_weights, w2, hidden, grad_hidden, scaled_act, slopes, l.T, rows, H, I, l.E,
                          static_cast<int>(kind), l.interleaved, l.transposed});
  run("grad_score_" + type, GradScoreParams<T>{slopes, inverse, grad_out, b2, offsets, grad_weights, l.T, l.K, rows, l.E, H, runs});
  GradWeightParams<T> of_w2{grad_out, scaled_act, gather, nullptr, offsets, grad_w2, nullptr, 0, l.T, rows, H, I, l.E};
  GradWeightParams<T> of_w1{grad_hidden, x, nullptr, gather, offsets, grad_w1, nullptr, 0, l.T, rows, l.N, H, l.E};
  for (auto* p : {&of_w1, &of_w2})
    if (l.transposed) std::swap(p->a, p->b), std::swap(p->gather_a, p->gather_b), std::swap(p->m, p->n);
  run(product("grad_weight", l.transposed ? "b" : "a"), of_w2);
  run(product("grad_weight", l.transposed ? "a" : "b"), of_w1);
  run("grad_bias_" + type, GradBiasParams<T>{grad_out, gather, sorted_weights, offsets, nullptr, grad_b2, l.E, rows, l.T, H, 1});
  run("grad_bias_" + type, GradBiasParams<T>{grad_hidden, nullptr, nullptr, offsets, nullptr, grad_b1, l.E, rows, rows, l.N, 1});
  run(product("gemm", l.transposed ? "nt" : "nn"), GemmParams<T>{grad_hidden, offsets, w1, nullptr, grad_rows, rows, l.N, H, l.E, !l.transposed});
  run("combine_" + type, CombineParams<T>{grad_rows, inverse, nullptr, grad_x, l.T, l.K, rows, H});
  run("grad_route_" + type, GradRouteParams<T>{logits, ids, scores, nullptr, grad_weights, nullptr, grad_logits, nullptr, l.T, l.E, l.K,
                                               moe::SOFTMAX, moe::SCORE_TOPK, 1, 0, 1, 0});

  const Tensors values{reals(x), reals(w1), reals(b1), reals(w2), reals(b2), reals(logits), {}};
  const auto [want, grads] = in_float64(l, values, reals(grad_out), ids, inverse);
  const double rounding = sizeof(T) == 2 ? test::rounding<T>() : 0x1p-21;
  expect_alike(out, want.out, rounding);
  expect_alike(grad_x, grads.x, rounding);
  expect_alike(grad_w1, grads.w1, rounding);
  expect_alike(grad_b1, grads.b1, rounding);
  expect_alike(grad_w2, grads.w2, rounding);
  expect_alike(grad_b2, grads.b2, rounding);
  expect_alike(grad_logits, grads.logits, rounding);
}

tile::Kind any_kind() { return static_cast<tile::Kind>(uniform(0, 9)); }

}  // namespace

TEST(layer_bf16) { check_layer<bf16>("128x128", 40, 72, any_of({tile::Kind::SWIGLU, tile::Kind::SWIGLU_OAI, tile::Kind::GELU})); }
TEST(layer_f32) { check_layer<float>("128x128", 36, 44, any_kind()); }
TEST(layer_any) { check_layer<float>("64x128", 23, 37, any_kind()); }
