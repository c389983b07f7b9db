// Products of fragments, tiles and descriptors that are laid out as CuTe says, on the emulator: they are the right ones
// only where cuda/ptx and the emulator have the same layouts.
#include "oracle/cute.h"
#include "tests/harness.h"

using namespace ptx;

namespace {

// Whole numbers, so that sums are exact in every order.
std::vector<int> numbers(int count) {
  std::vector<int> all(count);
  for (int& x : all) x = static_cast<int>(uniform(-8, 8));
  return all;
}
template <class T> uint32_t bits(int x) {
  if constexpr (sizeof(T) == 2) return from_float<T>(static_cast<float>(x)).bits;
  else return float_bits(static_cast<float>(x));
}

// Register r of lane l is word r * 32 + l.
struct Product {
  Global<const uint32_t> a, b;
  Global<float> c;
};
template <class T> PTX_D void product(const Product& p) {
  const int lane = thread_id();
  uint32_t a[4], b[2];
  float c[4] = {};
  for (int r = 0; r < 4; r++) a[r] = load_readonly(p.a + (r * 32 + lane));
  for (int r = 0; r < 2; r++) b[r] = load_readonly(p.b + (r * 32 + lane));
  mma<T>(c, a, b);
  for (int r = 0; r < 4; r++) store(p.c + (r * 32 + lane), c[r]);
}
PTX_KERNEL(product_bf16, 32, 1, 16, product<bf16>, Product)
PTX_KERNEL(product_f16, 32, 1, 16, product<f16>, Product)
PTX_KERNEL(product_tf32, 32, 1, 16, product<float>, Product)

template <class T> void check_product(const char* kernel, const oracle::Fragments& fragments) {
  constexpr int values = 4 / sizeof(T), depth = 8 * values;  // of a register
  const auto a = numbers(16 * depth), b = numbers(8 * depth);
  const auto registers = [](const std::vector<int>& matrix, int (*index)(int, int)) {
    return [&matrix, index](int64_t i) {
      uint32_t word = 0;
      for (int v = 0; v < values; v++) word |= bits<T>(matrix[index(i % 32, i / 32 * values + v)]) << v * 16;
      return word;
    };
  };
  auto c = output<float>("c", 128);
  launch(kernel, 1, Product{input<uint32_t>("a", 128, registers(a, fragments.a)), input<uint32_t>("b", 64, registers(b, fragments.b)), c});
  expect_equal(c, [&](int64_t i) {
    const int at = fragments.c(i % 32, i / 32), m = at % 16, n = at / 16;
    int sum = 0;
    for (int k = 0; k < depth; k++) sum += a[m + 16 * k] * b[n + 8 * k];
    return static_cast<float>(sum);
  });
}

// Element e of lane l's row is 8 l + e.
struct Matrices {
  Global<uint32_t> out;
  int transposed;
};
PTX_D void matrices(const Matrices& p) {
  const int lane = thread_id();
  const Shared row = shared_memory() + lane * 16;
  for (uint32_t e = 0; e < 8; e += 2) store_shared(row + 2 * e, (8 * lane + e) | (8 * lane + e + 1) << 16);
  sync_warp();
  uint32_t r[4];
  if (p.transposed) ldmatrix_x4_trans(r, row);
  else ldmatrix_x4(r, row);
  for (int i = 0; i < 4; i++) store(p.out + (lane * 4 + i), r[i]);
}
PTX_KERNEL(four_matrices, 32, 1, 512, matrices, Matrices)

// Tiles of 64 x 64 and N x 64, as they lie in shared memory, and descriptors of their steps along K.
struct Group {
  Global<const uint32_t> a, b;
  uint64_t a_steps[4], b_steps[4];
  int a_mn_major, b_mn_major;
  Global<float> sums;
};
enum { a_bytes = 64 * 128 };
template <int N> PTX_D void group_product(const Group& p) {
  const int t = thread_id();
  const Shared a = shared_memory(), b = a + a_bytes;
  for (int i = t; i < a_bytes / 4; i += 128) store_shared(a + i * 4, load_readonly(p.a + i));
  for (int i = t; i < N * 32; i += 128) store_shared(b + i * 4, load_readonly(p.b + i));
  fence_proxy_async();
  sync_block();
  float sums[N / 2];
  wgmma_fence();
  for (int k = 0; k < 4; k++) {
    const uint64_t a_step = p.a_steps[k] + a.at / 16, b_step = p.b_steps[k] + b.at / 16;
    if (p.a_mn_major && p.b_mn_major) wgmma<bf16, true, true>(sums, a_step, b_step, k > 0);
    else if (p.a_mn_major) wgmma<bf16, true, false>(sums, a_step, b_step, k > 0);
    else if (p.b_mn_major) wgmma<bf16, false, true>(sums, a_step, b_step, k > 0);
    else wgmma<bf16, false, false>(sums, a_step, b_step, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; i++) store(p.sums + (i * 128 + t), sums[i]);
}
PTX_KERNEL(group_64, 128, 1, a_bytes + 64 * 128, group_product<64>, Group)
PTX_KERNEL(group_128, 128, 1, a_bytes + 128 * 128, group_product<128>, Group)
PTX_KERNEL(group_256, 128, 1, a_bytes + 256 * 128, group_product<256>, Group)

struct Tile {
  bool mn_major;
  int rows;
  std::vector<int> values;  // row * 64 + k
  Tile(bool mn_major, int rows) : mn_major(mn_major), rows(rows), values(numbers(rows * 64)) {}
  test::Buffer<uint32_t> image(const char* name) const {
    std::vector<uint32_t> words(rows * 32);
    for (int row = 0; row < rows; row++)
      for (int k = 0; k < 64; k++) {
        const uint32_t byte = oracle::tile_byte(mn_major, rows, row, k);
        words[byte / 4] |= bits<bf16>(values[row * 64 + k]) << byte % 4 * 8;
      }
    return input<uint32_t>(name, words.size(), [&](int64_t i) { return words[i]; });
  }
  void steps(uint64_t (&descriptors)[4]) const {
    for (int step = 0; step < 4; step++) descriptors[step] = oracle::descriptor(mn_major, rows, step);
  }
};

void check_group(const char* kernel, int columns) {
  for (int majors = 0; majors < 4; majors++) {
    const Tile a(majors & 1, 64), b(majors & 2, columns);
    auto sums = output<float>("sums", columns * 64);
    const auto a_image = a.image("a"), b_image = b.image("b");
    Group group{a_image, b_image, {}, {}, a.mn_major, b.mn_major, sums};
    a.steps(group.a_steps);
    b.steps(group.b_steps);
    launch(kernel, 1, group);
    expect_equal(sums, [&](int64_t i) {
      const int at = oracle::accumulator(columns, i % 128, i / 128), m = at % 64, n = at / 64;
      int sum = 0;
      for (int k = 0; k < 64; k++) sum += a.values[m * 64 + k] * b.values[n * 64 + k];
      return static_cast<float>(sum);
    });
  }
}

}  // namespace

TEST(fragments_bf16) { check_product<bf16>("product_bf16", oracle::bf16_16x8x16); }
TEST(fragments_f16) { check_product<f16>("product_f16", oracle::f16_16x8x16); }
TEST(fragments_tf32) { check_product<float>("product_tf32", oracle::tf32_16x8x8); }

TEST(ldmatrix) {
  for (bool transposed : {false, true}) {
    auto out = output<uint32_t>("out", 128);
    launch("four_matrices", 1, Matrices{out, transposed});
    expect_equal(out, [&](int64_t i) {
      const auto element = [&](int half) { return static_cast<uint32_t>(oracle::matrix_element(transposed, i / 4, i % 4 * 2 + half)); };
      return element(0) | element(1) << 16;
    });
  }
}

TEST(wgmma_64) { check_group("group_64", 64); }
TEST(wgmma_128) { check_group("group_128", 128); }
TEST(wgmma_256) { check_group("group_256", 256); }

TEST(swizzle) {
  for (uint32_t row = 0; row < 128; row++)
    for (uint32_t k = 0; k < 64; k++)
      expect(oracle::tile_byte(false, 128, row, k) == emulator::swizzle128(row * 128 + k * 2), "128-byte swizzle");
}

TEST(descriptors) {
  for (uint32_t step = 0; step < 4; step++)
    for (int rows : {128, 256}) {
      expect(oracle::descriptor(false, rows, step) == descriptor({step * 32}), "descriptor, K-major");
      expect(oracle::descriptor(true, rows, step) == descriptor_transposed({step * 2048}, 8192), "descriptor, MN-major");
    }
}
