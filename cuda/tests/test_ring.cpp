// The asynchronous half of the instructions together: TMA, mbarriers, wgmma, proxies.
#include "tests/harness.h"
#include "tests/ring.cuh"

using namespace ptx;

static void check_ring(const std::vector<int>& sizes, int n, int k, ring::Kind kind) {
  std::vector<int> offsets{0};
  for (int size : sizes) offsets.push_back(offsets.back() + size);
  const int rows = offsets.back(), experts = static_cast<int>(sizes.size());
  const bool gather = kind == ring::gathered, pair = kind == ring::paired;
  const int tokens = gather ? rows / 2 + 1 : std::max(rows, 1);
  auto x = input<bf16>("x", int64_t{tokens} * k, [](int64_t) { return normal(); });
  auto w = input<bf16>("w", int64_t{experts} * n * k, [](int64_t) { return normal(); });
  auto index = input<int>("gather", rows, [&](int64_t i) { return gather ? uniform(0, tokens - 1) : i; });
  auto starts = input<int>("offsets", experts + 1, [&](int64_t i) { return offsets[i]; });
  auto y = output<bf16>("y", int64_t{rows} * n);
  const auto map = [](const auto& b, int64_t width, int64_t height, int64_t depth, uint32_t box_height) {
    return emulator::make_tensor_map(b.values().data(), 2, width, height, depth, width * 2, height * width * 2, 64, box_height, true);
  };
  launch(gather ? "test_ring_gather" : pair ? "test_ring_pair" : "test_ring", pair ? 4 : 2,
         ring::Params{map(x, k, tokens, 1, 128), map(w, k, n, experts, pair ? 64 : 128), map(y, n, std::max(rows, 1), 1, 64), x, index, starts, y,
                      experts, n, k});
  for (int e = 0; e < experts; e++)
    for (int r = offsets[e]; r < offsets[e + 1]; r++)
      for (int c = 0; c < n; c++) {
        double sum = 0, absolute = 0;
        for (int i = 0; i < k; i++) {
          const double term = test::real(x[int64_t{index[r]} * k + i]) * test::real(w[(int64_t{e} * n + c) * k + i]);
          sum += term;
          absolute += std::fabs(term);
        }
        const double got = test::real(y[int64_t{r} * n + c]);
        expect(std::fabs(got - sum) <= sum_bound<bf16>(sum, absolute, k), "y at row " + std::to_string(r) + ", column " + std::to_string(c) +
               " is " + std::to_string(got) + ", not " + std::to_string(sum));
      }
}

static const std::vector<std::vector<int>> ragged = {{64, 64}, {1}, {0, 5, 0, 130, 64, 1, 0}, {128, 0, 129}, {0, 0}, {63, 65, 127}};
static void check_some(ring::Kind kind) {
  check_ring(ragged[uniform(0, 5)], static_cast<int>(uniform(1, 18)) * 8, static_cast<int>(uniform(1, 36)) * 8, kind);
}
TEST(ring) { check_some(ring::plain); }
TEST(ring_many_steps) { check_ring({130, 64}, 136, 456, ring::plain); }
TEST(ring_gather) { check_some(ring::gathered); }
TEST(ring_gather_many_steps) { check_ring({65, 129}, 72, 456, ring::gathered); }
TEST(ring_pair) { check_some(ring::paired); }
TEST(ring_pair_many_steps) { check_ring({65, 260}, 136, 456, ring::paired); }

template <class T> static void check_transposed(const char* kernel) {
  auto a = input<T>("a", 64 * 64, [](int64_t) { return normal(); });
  auto b = input<T>("b", 64 * 128, [](int64_t) { return normal(); });
  auto y = output<float>("y", 64 * 128);
  launch(kernel, 1, ring::TransposedParams{emulator::make_tensor_map(a.values().data(), 2, 64, 64, 1, 128, 8192, 64, 64, true),
                                           emulator::make_tensor_map(b.values().data(), 2, 128, 64, 1, 256, 16384, 64, 64, true), y});
  const auto sum = [&](int64_t at, bool absolute) {
    double s = 0;
    for (int i = 0; i < 64; i++) {
      const double term = test::real(a[i * 64 + at / 128]) * test::real(b[i * 128 + at % 128]);
      s += absolute ? std::fabs(term) : term;
    }
    return s;
  };
  expect_close(y, [&](int64_t at) { return sum(at, false); }, [&](int64_t at) { return sum_bound<float>(0, sum(at, true), 64); });
}
TEST(transposed_bf16) { check_transposed<bf16>("test_transposed_bf16"); }
TEST(transposed_f16) { check_transposed<f16>("test_transposed_f16"); }
