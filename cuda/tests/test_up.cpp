// The up projection with its activation against float64.
#include "kernels/sm80_up.cu"
#include "kernels/sm90_up.cu"
#include "tests/pairs.h"

using namespace test;

namespace {

template <class Math> void check_up(const Entry& entry) {
  using T = ElementOf<Math>;
  const Reference act = entry.activation();
  const bool gated = act.gated(), interleaved = gated && chance(2), transposed = entry.any() ? chance(2) : entry.variant == "nn";
  const bool gathered = !chance(3), biased = chance(2), keep = !chance(4);
  const int H = entry.depth<T>(), I = entry.width<T>(), N = gated ? 2 * I : I;
  const SortedRows rows = some_rows(static_cast<int64_t>(N) * H);

  const auto x = rows.input_rows<T>("x", H, gathered, entry.skip());
  const auto gather = rows.gather_input(), offsets = rows.offsets_input();
  const auto w1 = rows.of_experts<T>("w1", static_cast<int64_t>(N) * H, entry.skip(), 2 / std::sqrt(H));
  const auto b1 = rows.of_experts<T>("b1", N, entry.skip());
  const auto hidden = output<T>("hidden", static_cast<int64_t>(rows.rows) * N, entry.skip());
  const auto out = output<T>("act", static_cast<int64_t>(rows.rows) * I, entry.skip());
  UpParams<T> p{x, gather, offsets, w1, b1, hidden, out, rows.tokens, rows.rows, H, I, rows.experts(), static_cast<int>(act.kind()), interleaved, transposed};
  if (!gathered) p.gather = nullptr;
  if (!biased) p.b1 = nullptr;
  if (!keep) p.hidden = nullptr;
  launch_product(entry, p, [&](auto& maps) {
    maps.b = map_of_weights(w1, N, H, p.experts, transposed);
    map_hidden(maps.out, hidden, N, p.rows, gated && !interleaved);
    maps.out[2] = map_of_results(out, I, p.rows);
  });

  const auto a = operand(x, H, gathered ? rows.gather : std::vector<int>());
  const Weights w{reals(w1), N, H, transposed};
  std::vector<Near> sums(hidden.size());
  for (int row = 0, at = 0; row < rows.rows; row++)
    for (int c = 0; c < N; c++, at++)
      if (const int e = rows.expert(row); e < rows.experts())
        sums[at] = w.product(a[row], e, c, biased ? real(b1[int64_t{e} * N + c]) : 0, entry.tf32());
  if (keep) expect_near(hidden, [&](int64_t i) { return sums[i]; });
  expect_near(out, [&](int64_t i) {
    const Near* row = &sums[i / I * N];
    const int64_t unit = i % I;
    if (!gated) return act(row[unit], {});
    return interleaved ? act(row[2 * unit], row[2 * unit + 1]) : act(row[unit], row[I + unit]);
  });
}

// Tokens that lie more than 2^32 elements behind the first.
void check_last_tokens(const char* name) {
  constexpr int rows = 3, tokens = (1 << 20) + rows, H = 4096, I = 64;
  const Reference act(tile::Kind::RELU);
  const auto x = vast<bf16>("x", int64_t{tokens} * H, rows * H, [](int64_t) { return normal(); });
  const auto gather = input<int>("gather", rows, [](int64_t i) { return tokens - rows + i; });
  const auto offsets = input<int>("offsets", 2, [](int64_t e) { return e * rows; });
  const auto w1 = input<bf16>("w1", I * H, [](int64_t) { return normal(); });
  const auto out = output<bf16>("act", rows * I);
  launch(name, 1, UpParams<bf16>{x, gather, offsets, w1, nullptr, nullptr, out, tokens, rows, H, I, 1, static_cast<int>(act.kind()), 0, 0});
  const Weights w{reals(w1), I, H, false};
  const auto last = reals(x.values().last(rows * H));
  expect_near(out, [&](int64_t i) { return act(w.product(&last[i / I * H], 0, static_cast<int>(i % I), 0, false), {}); });
}

const bool entries = test_entries("up", []<class Math>(const Entry& entry) { check_up<Math>(entry); });

}  // namespace

TEST(up_last_tokens_beyond_32_bits) {
  check_last_tokens("up_bf16_32x128_nt");
  check_last_tokens("up_bf16_64x128_any");
}
