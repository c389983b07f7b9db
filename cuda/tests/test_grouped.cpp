// The grouped products over sorted rows against float64.
#include "tests/harness.h"
#include "kernels/sm80_grouped_gemm.cu"

static void check_gemm(const char* kernel, bool transposed, const std::vector<int>& sizes, int n, int k) {
  std::vector<int> starts{0};
  for (int size : sizes) starts.push_back(starts.back() + size);
  const int used = starts.back(), rows = used + 3, experts = static_cast<int>(sizes.size());
  auto a = input<bf16>("a", int64_t{rows} * k, [](int64_t) { return normal(); });
  auto w = input<bf16>("w", int64_t{experts} * n * k, [](int64_t) { return normal(); });
  auto bias = input<bf16>("bias", int64_t{experts} * n, [](int64_t) { return normal(); });
  auto offsets = input<int>("offsets", experts + 1, [&](int64_t i) { return starts[i]; });
  auto y = output<bf16>("y", int64_t{rows} * n);
  launch(kernel, 3, GemmParams<bf16>{a, offsets, w, bias, y, rows, k, n, experts, transposed});
  for (int e = 0, r = 0; r < rows; r++) {
    while (e < experts && r >= starts[e + 1]) e++;
    for (int c = 0; c < n; c++) {
      double sum = 0, absolute = 0;
      if (e < experts) sum = test::real(bias[int64_t{e} * n + c]), absolute = std::fabs(sum);
      for (int i = 0; e < experts && i < k; i++) {
        const int64_t at = int64_t{e} * n * k + (transposed ? int64_t{i} * n + c : int64_t{c} * k + i);
        const double term = test::real(a[int64_t{r} * k + i]) * test::real(w[at]);
        sum += term;
        absolute += std::fabs(term);
      }
      const double got = test::real(y[int64_t{r} * n + c]);
      expect(std::fabs(got - sum) <= sum_bound<bf16>(sum, absolute, k), "y at row " + std::to_string(r) + ", column " + std::to_string(c) +
             " is " + std::to_string(got) + ", not " + std::to_string(sum));
    }
  }
}
TEST(gemm_nt) { check_gemm("gemm_bf16_128x128_nt", false, {0, 5, 0, 130, 1}, 136, 200); }
TEST(gemm_nn) { check_gemm("gemm_bf16_128x128_nn", true, {0, 5, 0, 130, 1}, 136, 200); }
TEST(gemm_wide_nt) { check_gemm("gemm_bf16_128x256_nt", false, {3, 0, 129}, 264, 72); }
TEST(gemm_small_nn) { check_gemm("gemm_bf16_32x128_nn", true, {3, 0, 65}, 264, 72); }
TEST(gemm_any) { check_gemm("gemm_bf16_64x128_any", true, {3, 0, 65}, 37, 41); }
