// The gradient of the hidden states, and what it leaves for the other gradients, against float64.
#include "kernels/sm80_grad_hidden.cu"
#include "kernels/sm90_grad_hidden.cu"
#include "tests/pairs.h"

using namespace test;

namespace {

template <class Math> void check_grad_hidden(const Entry& entry) {
  using T = ElementOf<Math>;
  const Reference act = entry.activation();
  const bool gated = act.gated(), interleaved = gated && chance(2), transposed = entry.any() ? chance(2) : entry.variant == "nt";
  const bool gathered = !chance(3), weighted = !chance(4);
  const int64_t wanted = uniform(1, 7);
  const int H = entry.depth<T>(), I = entry.width<T>(), N = gated ? 2 * I : I, runs = (I + 31) / 32;
  const SortedRows rows = some_rows(static_cast<int64_t>(I) * H);

  const auto grad_out = rows.input_rows<T>("grad_out", H, gathered, entry.skip());
  const auto gather = rows.gather_input(), offsets = rows.offsets_input();
  const auto weights = input<float>("weights", rows.rows, [&](int64_t row) { return rows.used(row) ? normal() : 0; });
  const auto w2 = rows.of_experts<T>("w2", static_cast<int64_t>(H) * I, entry.skip(), 1 / std::sqrt(H));
  const float spread = act.kind() == Kind::SWIGLU_OAI || chance(2) ? 5 : 1;  // also beyond the limits of the former
  const auto hidden = input<T>("hidden", static_cast<int64_t>(rows.rows) * N, [&](int64_t i) {
    const int row = static_cast<int>(i / N);
    return rows.expert(row) == rows.spoilt ? NAN : rows.used(row) ? spread * normal() : 0;
  }, entry.skip());
  const auto grad_hidden = output<T>("grad_hidden", static_cast<int64_t>(rows.rows) * N, entry.skip());
  const auto scaled_act = output<T>("scaled_act", static_cast<int64_t>(rows.rows) * I, entry.skip());
  const auto slopes = output<float>("slopes", static_cast<int64_t>(rows.rows) * runs);
  GradHiddenParams<T> p{grad_out, gather, offsets, weights, w2, hidden, grad_hidden, scaled_act, slopes, rows.tokens, rows.rows, H, I,
                        rows.experts(), static_cast<int>(act.kind()), interleaved, transposed};
  if (!gathered) p.gather = nullptr;
  if (!weighted) p.weights = nullptr;
  if (!(wanted & 1)) p.grad_hidden = nullptr;
  if (!(wanted & 2)) p.scaled_act = nullptr;
  if (!(wanted & 4)) p.slopes = nullptr;
  launch_product(entry, p, [&](auto& maps) {
    const bool halves = gated && !interleaved;
    maps.b = map_of_weights(w2, I, H, p.experts, !transposed);
    map_hidden(maps.in, hidden, N, p.rows, halves);
    map_hidden(maps.out, grad_hidden, N, p.rows, halves);
    maps.out[2] = map_of_results(scaled_act, I, p.rows);
  });

  const auto grad = operand(grad_out, H, gathered ? rows.gather : std::vector<int>());
  const Weights w{reals(w2), I, H, !transposed};
  std::vector<Near> want_hidden(grad_hidden.size()), want_act(scaled_act.size()), want_slopes(slopes.size());
  for (int row = 0, at = 0; row < rows.rows; row++)
    for (int unit = 0; unit < I; unit++, at++) {
      const int e = rows.expert(row);
      const int64_t first = static_cast<int64_t>(row) * N, gate_at = first + (interleaved ? 2 * unit : unit), up_at = gate_at + (interleaved ? 1 : I);
      const Near weight{weighted ? weights[row] : 1.0}, up{gated ? real(hidden[up_at]) : 1};
      const Near d = e < rows.experts() ? w.product(grad[row], e, unit, 0, entry.tf32()) : Near{};
      const auto [value, slope] = act.at(real(hidden[gate_at]));
      const Near out = value * act.factor(up);
      want_hidden[gate_at] = weight * d * act.factor(up) * slope;
      if (gated) want_hidden[up_at] = act.passes(up.value) ? weight * d * value : Near{};
      want_act[at] = weight * out;
      Near& sum = want_slopes[int64_t{row} * runs + unit / 32];
      const Near term = d * out;
      sum = {sum.value + term.value, sum.error + term.error + 32 * UNIT * std::fabs(term.value)};
    }
  if (p.grad_hidden) expect_near(grad_hidden, [&](int64_t i) { return want_hidden[i]; });
  if (p.scaled_act) expect_near(scaled_act, [&](int64_t i) { return want_act[i]; });
  if (p.slopes) expect_near(slopes, [&](int64_t i) { return want_slopes[i]; });
}

const bool entries = test_entries("grad_hidden", []<class Math>(const Entry& entry) { check_grad_hidden<Math>(entry); });

}  // namespace
