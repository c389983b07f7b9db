// Every instruction on the CPU against its definition, and each thing that the emulator looks for.
#include <algorithm>
#include <map>

#include "emulator/api.h"
#include "tests/harness.h"
#include "tests/probes.cuh"

using namespace ptx;

namespace {

// Floats at the ends of formats: zeros, subnormals, the largest and what rounds beyond them, infinities and NaN.
constexpr uint32_t edges[] = {0,          0x80000000, 1,          0x807fffff, 0x00800000, 0x33000001, 0x387fe000, 0x477fefff, 0xc77ff000,
                              0x7f7f8000, 0xff7fefff, 0x7f7ff000, 0xff7fffff, 0x7f800000, 0xff800000, 0x7f800001, 0xff9e4840, 0x7fffffff};
uint32_t some_word() {
  const uint64_t r = test::random()();
  return r >> 62 ? static_cast<uint32_t>(r) : edges[static_cast<uint32_t>(r) % std::size(edges)];
}

struct Probe {
  test::Buffer<uint32_t> in, out;
  explicit Probe(const char* kernel)
      : in(input<uint32_t>("in", probes::in_words, [](int64_t) { return some_word(); })),
        out(output<uint32_t>("out", probes::out_words)) {
    const auto map = [](const auto& b) { return emulator::make_tensor_map(b.values().data(), 2, 64, 128, 1, 128, 16384, 64, 64, true); };
    launch(kernel, 1, probes::Params{map(in), map(out), in, out});
  }
  uint32_t half(int64_t i) const { return in[i / 2] >> i % 2 * 16 & 0xffff; }
};

int whole(uint32_t x) { return static_cast<int>(x % 17) - 8; }
void same(uint32_t got, uint32_t want, const char* what, test::Where where = test::Where::current()) {
  expect(got == want, std::string(what) + ": " + std::to_string(got) + ", not " + std::to_string(want), where);
}
void same(uint32_t got, double want, const char* what, test::Where where = test::Where::current()) {
  expect(bits_float(got) == want, std::string(what) + ": " + std::to_string(bits_float(got)) + ", not " + std::to_string(want), where);
}

}  // namespace

TEST(lanes) {
  Probe p("probe_lanes");
  for (int t = 0; t < 64; t++) {
    const int lane = t % 32, w = t - lane;
    const auto x = [&](int l) { return p.in[w + l]; };
    uint32_t votes = 0, equal = 0, sum = 0, high = 0, low = ~0u;
    for (int l = 0; l < 32; l++) {
      votes |= uint32_t{x(l) % 3 == 0} << l;
      equal |= uint32_t{x(l) % 5 == x(lane) % 5} << l;
      sum += x(l);
      high = std::max(high, x(l));
      low = std::min(low, x(l));
    }
    const uint32_t want[] = {x((lane * 7 + 3) % 32), x(lane ^ 5), lane < 3 ? x(lane) : x(lane - 3), votes, equal, high, low, sum};
    for (int i = 0; i < 8; i++) same(p.out[i * 64 + t], want[i], "lanes");
  }
}

// The nearest value of a format is found by looking at all of them.
TEST(conversions) {
  Probe p("probe_conversions");
  std::map<double, uint16_t> values[2];
  for (uint32_t bits = 0; bits < 0x10000; bits++)
    for (int f = 0; f < 2; f++) {
      const double v = f ? to_float(f16{static_cast<uint16_t>(bits)}) : to_float(bf16{static_cast<uint16_t>(bits)});
      if (std::isfinite(v) && bits != 0x8000) values[f][v] = static_cast<uint16_t>(bits);
    }
  for (int t = 0; t < 128; t++) {
    const double x = bits_float(p.in[t]);
    for (int f = 0; f < 2; f++) {
      const uint32_t got = p.out[f * 128 + t], infinity = f ? 0x7c00 : 0x7f80;
      const double largest = values[f].rbegin()->first, step = largest - std::prev(values[f].end(), 2)->first;
      if (std::isnan(x)) same(got, 0x7fffu, "NaN");
      else if (std::fabs(x) >= largest + step / 2) same(got, infinity | (x < 0 ? 0x8000u : 0u), "overflow");
      else {
        const auto above = values[f].lower_bound(x);
        const auto below = above == values[f].begin() || above->first == x ? above : std::prev(above);
        const double up = above == values[f].end() ? HUGE_VAL : above->first - x, down = x - below->first;
        const auto nearest = up < down || (up == down && above->second % 2 == 0) ? above : below;
        const uint32_t zero_sign = nearest->first == 0 && std::signbit(x) ? 0x8000 : 0;
        same(got, nearest->second | zero_sign, f ? "f16" : "bf16");
      }
      same(p.out[(2 + f) * 128 + t] & 0xffff, got, "pack");
    }
    const uint32_t tf32 = p.out[7 * 128 + t];
    same(tf32 & 0x1fff, 0u, "low bits of tf32");
    if (!std::isfinite(x)) same(tf32, p.in[t] & ~0x1fffu, "tf32");
    else if (std::fabs(x) >= 0x1.ffep127) same(tf32, std::signbit(x) ? 0xff800000u : 0x7f800000u, "tf32 beyond the largest");
    else expect(std::fabs(bits_float(tf32) - x) <= std::fabs(x) * 0x1p-11 + 0x1p-137, "tf32");
  }
}

TEST(arithmetic) {
  Probe p("probe_arithmetic");
  for (int t = 0; t < 128; t++) {
    const double x = bits_float(p.in[t]), y = bits_float(p.in[t + 128]);
    const float fused = std::fma(bits_float(p.in[t]), bits_float(p.in[t + 128]), bits_float(p.in[t + 256]));
    const double want[] = {x + y, x * y, x / y, fused, std::sqrt(x)};
    for (int i = 0; i < 5; i++) {
      const float rounded = static_cast<float>(want[i]);
      same(p.out[i * 128 + t], std::isnan(rounded) ? 0x7fffffffu : float_bits(rounded), "arithmetic");
    }
  }
}

TEST(approximations) {
  Probe p("probe_approximations");
  for (int t = 0; t < 128; t++) {
    const double x = whole(p.in[t]) + whole(p.in[t + 128]) / 16.0 + 0.03125;
    const double want[] = {std::exp2(x), 1 / x, std::tanh(x / 4), std::erf(x / 4)}, error[] = {0x1p-22, 0x1p-23, 0x1.025p-11, 0x1p-22};
    for (int i = 0; i < 4; i++) expect(std::fabs(bits_float(p.out[i * 128 + t]) - want[i]) <= std::fabs(want[i]) * error[i], "approximation");
  }
}

TEST(memory) {
  Probe p("probe_memory");
  uint32_t sum = 0, least = 1000;
  for (int t = 0; t < 64; t++) {
    sum += p.in[t] % 900;
    least = std::min(least, p.in[t] % 900);
    for (int i = 0; i < 4; i++) same(p.out[t * 4 + i], p.in[(t ^ 33) * 4 + i], "uint4");
    same(p.out[4 * 64 + t], p.in[t * 4 + 3], "load_streaming");
  }
  for (int t = 0; t < 64; t++) same(p.out[5 * 64 + t], t % 2 ? least : sum, "atomics");
}

TEST(copies) {
  Probe p("probe_copies");
  for (int t = 0; t < 64; t++)
    for (int i = 0; i < 8; i++) same(p.out[i * 64 + t], ((t ^ 1) % 3 != 0) == (i < 7) ? p.in[(t ^ 1) * 8 + i] : 0, "cp_async");
}

TEST(matrices) {
  Probe p("probe_matrices");
  for (int t = 0; t < 32; t++)
    for (int m = 0; m < 4; m++) {
      const auto element = [&](int row, int column) { return p.half((m * 8 + row) * 5 % 32 * 8 + column); };
      const int g = t / 4, q = t % 4 * 2;
      same(p.out[m * 32 + t], element(g, q) | element(g, q + 1) << 16, "ldmatrix");
      same(p.out[(4 + m) * 32 + t], element(q, g) | element(q + 1, g) << 16, "ldmatrix, transposed");
    }
}

// Fragments as the comment in device/mma.cuh has them.
static void check_products(const char* kernel, int depth) {
  Probe p(kernel);
  const bool pairs = depth == 16;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
          const auto value = [&](int lane, int reg, int k) {  // register `reg` of `lane`, high half for odd k of pairs
            return whole(p.in[lane + reg * 32 + (pairs && k % 2 ? 1024 : 0)]);
          };
          const int lane = row % 8 * 4 + column / 2, r = row / 8 * 2 + column % 2;
          double sum = whole(p.in[lane + 512 + ((i * 2 + j) * 4 + r) * 16]);
          for (int k = 0; k < depth; k++) {
            const int half = depth / 2, q = pairs ? k % half / 2 : k % half;
            sum += value(row % 8 * 4 + q, i * 4 + row / 8 + k / half * 2, k) * value(column * 4 + q, 8 + j * 2 + k / half, k);
          }
          same(p.out[((i * 2 + j) * 4 + r) * 32 + lane], sum, "mma_tile");
          if (i == 1 && j == 0) same(p.out[(16 + r) * 32 + lane], sum, "mma");
        }
}
TEST(products_bf16) { check_products("probe_products_bf16", 16); }
TEST(products_f16) { check_products("probe_products_f16", 16); }
TEST(products_tf32) { check_products("probe_products_tf32", 8); }

TEST(named_barriers) {
  Probe p("probe_named_barriers");
  for (int t = 32; t < 64; t++) same(p.out[t], p.in[(t ^ 17) % 32], "named barriers");
}

TEST(boxes) {
  Probe p("probe_boxes");
  for (int row = 0; row < 64; row++)
    for (int column = 0; column < 64; column++) {
      const uint32_t want = column + 24 < 64 && row + 96 < 128 ? p.half((row + 96) * 64 + column + 24) : 0;
      const auto half = [&](int64_t i) { return p.out[i / 2] >> i % 2 * 16 & 0xffff; };
      same(half(row * 64 + column), want, "tma_store");
      same(half(32 * 128 * 2 + row * 64 + (column ^ (row & 7) << 3)), want, "tma_load");
    }
}

static void check_warpgroup(const char* kernel, bool transposed) {
  Probe p(kernel);
  const auto value = [&](int base, int row, int column) {  // of the 64x64 tile in shared memory
    return whole(p.in[base + row * 32 + column / 2] >> (column % 2 ? 8 : 0));
  };
  for (int t = 0; t < 128; t++)
    for (int i = 0; i < 32; i++) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < 64; k++)
        sum += transposed ? value(0, k, row) * value(2048, k, column) : value(0, row, k) * value(2048, column, k);
      same(p.out[i * 128 + t], sum, "wgmma");
    }
}
TEST(warpgroup_bf16) { check_warpgroup("probe_warpgroup_bf16", false); }
TEST(warpgroup_f16) { check_warpgroup("probe_warpgroup_f16", false); }
TEST(warpgroup_transposed) { check_warpgroup("probe_warpgroup_transposed", true); }

TEST(arrivals) {
  Probe p("probe_arrivals");
  for (int t = 0; t < 64; t++) {
    for (int i = 0; t >= 32 && i < 4; i++) same(p.out[i * 64 + t], p.in[t % 32 * 4 + i], "cp_async_mbarrier_arrive");
    same(p.out[4 * 64 + t], 1u, "elect_one");
  }
}

// ---- What is to be refused. `fault` says what the kernel does wrong.
struct Faulty {
  Global<const int> in;
  Global<int> out, work, in_too;
  int fault;
};
PTX_D void faulty(const Faulty& p) {
  const int t = thread_id();
  const Shared at = shared_memory();
  switch (p.fault) {
    case 0: store(p.out + t / 2, 1); break;
    case 1: store(p.in_too + t, 1); break;
    case 2: load(p.out + t); break;
    case 3: load_readonly(p.in + 64 + t); break;
    case 4: load_readonly((p.in + 1).as<const uint2>()); break;
    case 5: store(p.work + t, 1); load_readonly((p.work + t).as<const int>()); break;
    case 6: load_shared<int>(at + 256 + t * 4); break;
    case 7: load_shared<int>(at + 2); break;
    case 8: store_shared(at, t); break;
    case 9: if (t < 16) sync_warp(); else ballot(true); break;
    case 10: if (t < 32) bar_sync(1, 64); break;
    case 11: if (t == 0) return; sync_warp(); break;
    case 12: cp_async<4>(at + t * 4, p.in.as<const void>(), true); break;
    case 13: mbarrier_arrive(at); break;
    case 14: if (t == 0) mbarrier_init(at, 1); sync_block(); if (t < 2) mbarrier_arrive_expect(at, 16); break;
    case 15: if (t == 0) { mbarrier_init(at, 1); store_shared(at, 0); mbarrier_arrive(at); } break;
    case 16: if (t == 0) { bar_arrive(1, 64); bar_arrive(1, 32); } break;
    case 17: load_readonly(Global<const int>(nullptr)); break;
    case 18: atomic_add(p.out, 1); break;
    case 19: store(p.work + t, t); load(p.work + (t ^ 32)); break;
    case 20: store(p.work + t, t); load(p.work + (t ^ 1)); break;
    case 21: load(p.work + t); sync_warp(); store(p.work + (t ^ 32), t); break;
    case 22: if (t == 0) store(p.work, block_id()); break;
    case 23: if (t == 0) atomic_add(p.work, 1); else if (t == 32) load(p.work); break;
  }
}
PTX_KERNEL(test_faulty, 64, 1, 256, faulty, Faulty)

TEST(faults) {
  static const char* const messages[] = {"written before", "read-only", "not yet written", "out of bounds", "misaligned",
      "but this kernel wrote it", "out of bounds", "not aligned", "race", "lanes of the warp differ", "deadlock", "return",
      "cp_async in flight", "not initialised", "more arrivals", "overwritten", "others arrived at it for", "null pointer", "write-once",
      "of work at byte", "of work at byte", "of work at byte", "of work at byte", "of work at byte"};
  for (int fault = 0; fault < static_cast<int>(std::size(messages)); fault++) {
    auto in = input<int>("in", 64, [](int64_t i) { return i; });
    auto out = output<int>("out", 64);
    auto work = scratch("work", 64, 0);
    expect_failure(messages[fault], [&] { launch("test_faulty", 2, Faulty{in, out, work, {in.values().data()}, fault}); });
  }
}

TEST(c_face) {
  uint32_t threads, shared_bytes;
  size_t params_bytes;
  expect(!emulator_kernel("test_faulty", &threads, &shared_bytes, &params_bytes), "known kernel");
  expect(threads == 64 && shared_bytes == 256 && params_bytes == sizeof(Faulty), "launch shape");
  expect(emulator_kernel("no_such", &threads, &shared_bytes, &params_bytes) != nullptr, "unknown kernel");
  const Faulty right{{nullptr}, {nullptr}, {nullptr}, {nullptr}, -1};
  expect(!emulator_launch("test_faulty", 3, &right, sizeof right), "launch");
  expect(emulator_launch("test_faulty", 3, &right, 1) != nullptr, "wrong size of parameters");
}
