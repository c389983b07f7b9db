// The emulator itself: right kernels pass, and each thing that it looks for is reported.
#include "tests/harness.h"

using namespace ptx;

// ---- A scan over the threads of a block, the way that the planning kernels do it.
struct ScanParams {
  Global<const int> x;
  Global<int> y;
  int64_t count;
};
PTX_D void scan(const ScanParams& p) {
  const int64_t i = static_cast<int64_t>(block_id()) * block_threads() + thread_id();
  const int lane = thread_id() % 32, warp = thread_id() / 32;
  int sum = i < p.count ? load_readonly(p.x + i) : 0;
  for (int d = 1; d < 32; d *= 2) {
    const int below = shfl_up(sum, d);
    if (lane >= d) sum += below;
  }
  if (lane == 31) store_shared(shared_memory() + warp * 4, sum);
  if (!BUG(scan_no_barrier)) sync_block();
  for (int w = 0; w < warp; w++) sum += load_shared<int>(shared_memory() + w * 4);
  if (BUG(scan_no_tail) || i < p.count) store(p.y + i, sum);
}
PTX_KERNEL(test_scan, 128, 1, 64, scan, ScanParams)

TEST(scan) {
  const int64_t n = uniform(1, 500);
  auto x = input<int>("x", n, [](int64_t) { return uniform(-9, 9); });
  auto y = output<int>("y", n);
  launch("test_scan", (n + 127) / 128, ScanParams{x, y, n});
  int sum = 0;
  expect_equal(y, [&](int64_t i) { return sum = (i % 128 ? sum : 0) + x[i]; });
}

// ---- Words that go from thread to thread through global memory.
struct ExchangeParams {
  Global<int> work, sum;
  Global<int> y;
};
PTX_D void exchange(const ExchangeParams& p) {
  const int t = thread_id(), first = block_id() * block_threads();
  store(p.work + (first + t), t);
  if (!BUG(exchange_no_sync_warp)) sync_warp();
  const int of_warp = load(p.work + (first + (t ^ 1)));
  if (!BUG(exchange_no_barrier)) sync_block();
  const int of_block = load(p.work + (first + (t ^ 33)));
  if (BUG(exchange_other_block) && block_id() > 0) load(p.work + t);
  store(p.y + (first + t), of_warp * 1000 + of_block);
  if (t == 0) atomic_add(p.sum, first);
}
PTX_KERNEL(test_exchange, 64, 1, 16, exchange, ExchangeParams)

TEST(exchange) {
  auto work = scratch("work", 192, 0), sum = scratch("sum", 1, 0);
  auto y = output<int>("y", 192);
  for (int launches = 0; launches < 2; launches++) launch("test_exchange", 3, ExchangeParams{work, sum, y});
  expect_equal(y, [](int64_t i) { return static_cast<int>((i % 64 ^ 1) * 1000 + (i % 64 ^ 33)); });
  expect(sum[0] == 2 * (64 + 128), "sum");
}

// ---- y [16, 8] = a [16, K] b [8, K]^T by one warp, through a ring of two stages.
template <class T> struct ProductParams {
  Global<const T> a, b;
  Global<float> y;
  int k;
};
template <class T> PTX_D void product(const ProductParams<T>& p) {
  constexpr int stage_bytes = (16 + 8) * 32;
  const int lane = thread_id();
  // Rows of 32 bytes, two chunks of 16; rows 0..15 are a's, 16..23 b's.
  const auto copy = [&](int step) {
    for (int i = lane; i < 48; i += 32) {
      const int row = i / 2, k = step * 16 + i % 2 * 8;
      const auto source = row < 16 ? p.a + int64_t{row} * p.k + k : p.b + int64_t{row - 16} * p.k + k;
      cp_async<16>(shared_memory() + step % 2 * stage_bytes + i * 16, source.template as<const void>(), BUG(product_no_tail) || k < p.k);
    }
    cp_async_commit();
  };
  float c[1][1][4] = {};
  const int steps = (p.k + 15) / 16;
  copy(0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) copy(step + 1);
    else cp_async_commit();
    if (BUG(product_short_wait)) cp_async_wait<2>();
    else cp_async_wait<1>();
    if (!BUG(product_no_barrier)) sync_block();
    const Shared tile = shared_memory() + step % 2 * stage_bytes;
    uint32_t a[1][4], b[4];
    ldmatrix_x4(a[0], tile + lane % 16 * 32 + lane / 16 * 16);
    ldmatrix_x4(b, tile + (16 + lane % 8) * 32 + lane / 8 % 2 * 16);
    const uint32_t b_tile[1][2] = {{b[0], b[1]}};
    mma_tile<T>(c, a, b_tile);
    if (!BUG(product_early_release)) sync_block();
  }
  for (int i = 0; i < 4; i++) store(p.y + (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2, c[0][0][i]);
}
PTX_KERNEL(test_product_bf16, 32, 1, 2 * 24 * 32, product, ProductParams<bf16>)
PTX_KERNEL(test_product_f16, 32, 1, 2 * 24 * 32, product, ProductParams<f16>)

template <class T> void check_product(const char* kernel) {
  const int k = static_cast<int>(uniform(1, 13)) * 8;
  auto a = input<T>("a", 16 * k, [](int64_t) { return normal(); });
  auto b = input<T>("b", 8 * k, [](int64_t) { return normal(); });
  auto y = output<float>("y", 16 * 8);
  launch(kernel, 1, ProductParams<T>{a, b, y, k});
  const auto sum = [&](int64_t at, bool absolute) {
    double s = 0;
    for (int i = 0; i < k; i++) {
      const double term = test::real(a[at / 8 * k + i]) * test::real(b[at % 8 * k + i]);
      s += absolute ? std::fabs(term) : term;
    }
    return s;
  };
  expect_close(y, [&](int64_t at) { return sum(at, false); }, [&](int64_t at) { return sum_bound<float>(0, sum(at, true), k); });
}
TEST(product_bf16) { check_product<bf16>("test_product_bf16"); }
TEST(product_f16) { check_product<f16>("test_product_f16"); }
