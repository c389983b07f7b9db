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
  explicit Probe(const char* kernel, int blocks = 1)
      : in(input<uint32_t>("in", probes::in_words, [](int64_t) { return some_word(); })),
        out(output<uint32_t>("out", probes::out_words)) {
    const auto map = [](const auto& b) { return emulator::make_tensor_map(b.values().data(), 2, 64, 64, 2, 128, 8192, 64, 64, true); };
    launch(kernel, blocks, probes::Params{map(in), map(out), in, out});
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

TEST(stored_matrices) {
  Probe p("probe_stored_matrices");
  for (int t = 0; t < 32; t++)
    for (int m = 0; m < 4; m++) {
      const int i = t / 4, q = t % 4, at = (m * 8 + i) * 5 % 32 * 4 + q;
      const auto half = [&](int lane) { return p.half((m * 32 + lane) * 2 + i % 2); };
      same(p.out[at], p.in[m * 32 + t], "stmatrix");
      same(p.out[128 + at], half(2 * q * 4 + i / 2) | half((2 * q + 1) * 4 + i / 2) << 16, "stmatrix, transposed");
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

// 16 bits of the box that starts at (x, y, z).
static uint32_t boxed(const Probe& p, int row, int column, int x, int y, int z) {
  return row + y < 64 && column + x < 64 ? p.half((z * 64 + row + y) * 64 + column + x) : 0;
}
static int swizzled(int row, int column) { return row * 64 + (column ^ (row & 7) << 3); }

TEST(boxes) {
  Probe p("probe_boxes");
  const auto half = [&](int64_t i) { return p.out[i / 2] >> i % 2 * 16 & 0xffff; };
  for (int row = 0; row < 64; row++)
    for (int column = 0; column < 64; column++) {
      const uint32_t stored = row >= 16 && column >= 8 ? boxed(p, row - 16, column - 8, 24, 32, 0) : 0xffff;
      same(half((64 + row) * 64 + column), stored, "tma_store");
      same(half(row * 64 + column), 0xffffu, "what tma_store leaves alone");
      same(half(32 * 128 * 2 + swizzled(row, column)), boxed(p, row, column, 24, 32, 0), "tma_load");
    }
}

TEST(far_boxes) {
  Probe p("probe_far_boxes");
  for (int i = 0; i < 5 * 128; i++) same(p.out[i], 0u, "outside of the tensor");
}

TEST(pairs) {
  Probe p("probe_pairs", 2);
  std::vector<uint16_t> boxes(2 * 4096);
  for (int rank = 0; rank < 2; rank++)
    for (int row = 0; row < 64; row++)
      for (int column = 0; column < 64; column++)
        boxes[rank * 4096 + swizzled(row, column)] = static_cast<uint16_t>(boxed(p, row, column, rank * 16, rank * 24, rank));
  const auto word = [&](int i) { return boxes[2 * i] | uint32_t{boxes[2 * i + 1]} << 16; };
  for (int rank = 0; rank < 2; rank++) {
    const auto result = [&](int i, int t) { return p.out[(rank * 20 + i) * 128 + t]; };
    for (int i = 0; i < 2048; i++) same(result(i / 128, i % 128), word(i) + 3 * word(2048 + i), "tma_load_pair");
    for (int t = 0; t < 128; t++) {
      same(result(16, t), static_cast<uint32_t>(rank), "cluster_rank");
      same(result(17, t), static_cast<uint32_t>(rank), "block_id");
      same(result(18, t), 2u, "block_count");
      same(result(19, t), 1u, "arrivals from both blocks");
    }
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

// The same between the blocks of a cluster.
struct FaultyPair {
  TensorMap map;  // a box of 64x64, 8192 bytes
  Global<int> work;
  int fault;
};
PTX_D void faulty_pair(const FaultyPair& p) {
  const int t = thread_id(), rank = cluster_rank(), fault = p.fault;
  const Shared box = shared_memory(), bar = box + 8192, others = {bar.at ^ 1u << 24};
  const bool first = t == 0;
  if (first && fault != 0) {
    mbarrier_init(bar, fault == 14 ? 2 : 1);
    if (fault != 1) fence_mbarrier_init();
  }
  if (fault == 2) sync_block();
  else if (fault == 3) { if (t < 16) sync_cluster(); else sync_warp(); }
  else sync_cluster();
  switch (fault) {
    case 0: case 2: if (first) mbarrier_arrive_at(bar, rank ^ 1); break;
    case 1: if (first) tma_load_pair(box, &p.map, bar, 0, 0, 0); break;
    case 4: if (rank == 1) return; if (first) mbarrier_arrive_at(bar, 1); break;
    case 5: if (rank == 1) return; if (first) tma_load_pair(box, &p.map, bar, 0, 0, 0); break;
    case 6: load_shared<int>(others); break;
    case 7: if (first) mbarrier_arrive(others); break;
    case 8: cp_async<4>(others, p.work.as<const void>(), false); break;
    case 9: if (first) mbarrier_arrive_at(bar, 2); break;
    case 10: if (first) mbarrier_arrive_at(others, rank); break;
    case 11: if (first) mbarrier_expect(bar, 16); break;
    case 12:
      if (first) mbarrier_arrive_expect(bar, 8192);
      if (rank == 0 && t == 32) tma_load_pair(box, &p.map, bar, 0, 0, 0);
      mbarrier_wait(bar, 0);
      if (rank == 1 && t == 32) tma_load_pair(box, &p.map, bar, 0, 0, 0);
      break;
    case 13:
      if (first) mbarrier_arrive_expect(bar, 4096);
      if (rank == 0 && t == 32) tma_load_pair(box, &p.map, bar, 0, 0, 0);
      mbarrier_wait(bar, 0);
      break;
    case 14:
      if (first) for (int i = 0; i < 2; i++) mbarrier_arrive_expect(bar, 8);
      sync_cluster();
      if (first) mbarrier_release_at(bar, rank ^ 1);
      break;
    case 15: if (rank == 0) store_shared(box + t * 4, t); else if (first) tma_load_pair(box, &p.map, bar, 0, 0, 0); break;
    case 16: if (rank == 0) mbarrier_wait(bar, 0); break;
    case 17: if (rank == 0 && first) store(p.work, 1); sync_cluster(); if (rank == 1) load(p.work); break;
    case 18: if (first) tma_load_pair(box, &p.map, bar, 0, 0, 0); break;
    case 19: if (first) for (int i = 0; i < 129; i++) mbarrier_expect(bar, 8192); break;
    case 20: if (t == 1) store_shared(box, t); if (t < 32) ptx::ballot(true); if (first) tma_load(box, &p.map, bar, 0, 0, 0); break;
  }
  sync_cluster();
}
PTX_CLUSTER_KERNEL(test_faulty_pair, 64, 1, 8192 + 8, faulty_pair, FaultyPair)
PTX_KERNEL(test_faulty_single, 64, 1, 8192 + 8, faulty_pair, FaultyPair)

TEST(faults_of_pairs) {
  static const char* const messages[] = {"not initialised", "no fence_mbarrier_init", "shared byte", "lanes of the warp differ",
      "returned from the kernel", "returned from the kernel", "out of bounds", "out of bounds", "out of bounds", "no block of rank 2",
      "out of bounds", "16 bytes more than came", "the block", "deadlock", "more arrivals", "race", "deadlock", "of work at byte",
      "race", "more than 2^20 - 1", "after a write by lane 1 of this warp"};
  auto in = input<bf16>("in", 64 * 64, [](int64_t) { return 1; });
  const TensorMap map = emulator::make_tensor_map(in.values().data(), 2, 64, 64, 1, 128, 8192, 64, 64, true);
  for (int fault = 0; fault < static_cast<int>(std::size(messages)); fault++) {
    auto work = scratch("work", 64, 0);
    expect_failure(messages[fault], [&] { launch("test_faulty_pair", 4, FaultyPair{map, work, fault}); });
  }
  auto work = scratch("work", 64, 0);
  launch("test_faulty_pair", 4, FaultyPair{map, work, -1});
  launch("test_faulty_single", 3, FaultyPair{map, work, -1});
  expect_failure("no multiple of the 2", [&] { launch("test_faulty_pair", 3, FaultyPair{map, work, -1}); });
  expect_failure("clusters have one block", [&] { launch("test_faulty_single", 1, FaultyPair{map, work, 18}); });
  expect_failure("no block of rank 1", [&] { launch("test_faulty_single", 1, FaultyPair{map, work, 0}); });
}

// Places where a box may begin, and may not.
struct Placed {
  TensorMap map;  // a box of 64x64, 8192 bytes
  emulator::Corner corner;
  bool store;
};
PTX_D void placed(const Placed& p) {
  const Shared box = shared_memory(), bar = box + 8192;
  if (thread_id()) return;
  const auto [x, y, z] = p.corner;
  mbarrier_init(bar, 1);
  fence_mbarrier_init();
  if (p.store) {
    for (int i = 0; i < 2048; i++) store_shared(box + i * 4, i);
    fence_proxy_async();
    tma_store(&p.map, box, x, y, z);
    tma_store_commit();
    tma_store_wait<0>();
  } else {
    mbarrier_arrive_expect(bar, 8192);
    tma_load(box, &p.map, bar, x, y, z);
    mbarrier_wait(bar, 0);
  }
}
PTX_KERNEL(test_placed, 32, 1, 8192 + 8, placed, Placed)

TEST(places_of_boxes) {
  struct Case { emulator::Corner corner; const char* message; };
  constexpr int far = 1 << 30;
  static const Case cases[] = {{{-8, 0, 0}, "at (-8, 0, 0): a coordinate is negative"},
                               {{0, -1, 0}, "at (0, -1, 0): a coordinate is negative"},
                               {{0, 0, -1}, "at (0, 0, -1): a coordinate is negative"},
                               {{4, 0, 0}, "at (4, 0, 0): x is no multiple of 16 bytes, of elements of 2"},
                               {{8, 1, 1}, nullptr}, {{64, 0, 0}, nullptr}, {{0, 64, 0}, nullptr}, {{0, 0, 2}, nullptr}, {{far, far, far}, nullptr}};
  for (bool store : {false, true})
    for (const auto& [corner, message] : cases) {
      auto work = scratch("work", 2 * 64 * 64, bf16{0});
      const Placed params{emulator::make_tensor_map(work.values().data(), 2, 64, 64, 2, 128, 8192, 64, 64, true), corner, store};
      if (message) expect_failure(std::string(store ? "tma_store " : "tma_load ") + message, [&] { launch("test_placed", 1, params); });
      else launch("test_placed", 1, params);
    }
}

// A box of 16x64, 2048 bytes, which a warp fills by stmatrix and stores by TMA.
struct FaultyStore {
  TensorMap to;
  int fault;
};
PTX_D void faulty_store(const FaultyStore& p) {
  const int t = thread_id(), fault = p.fault;
  const Shared box = shared_memory();
  const auto fill = [&](int first) {
    const uint32_t r[4] = {1, 2, 3, 4};
    for (int i = 0; i < 4; i++) stmatrix_x4(box + ((i * 32 + (first + t) % 32) * 16 + (fault == 5 ? 8 : fault == 6 ? 512 : 0)), r);
  };
  if (t >= 32 && fault > 0) return;
  fill(0);
  if (t >= 32) return;
  if (fault == 1) fill(1);
  if (fault != 2) fence_proxy_async();
  if (fault != 3) sync_warp();
  if (t == 0) {
    tma_store(&p.to, box, 0, 0, 0);
    tma_store_commit();
    if (fault != 4) tma_store_wait_read<0>();
  }
  sync_warp();
  fill(0);
}
PTX_KERNEL(test_faulty_store, 64, 1, 2048, faulty_store, FaultyStore)

TEST(faults_of_stored_matrices) {
  static const char* const messages[] = {"is not ordered after a write by warp", "of this warp", "no fence_proxy_async", "of this warp",
                                         "read by the asynchronous work", "not aligned", "out of bounds"};
  for (int fault = 0; fault <= static_cast<int>(std::size(messages)); fault++) {
    auto out = output<bf16>("out", 16 * 64);
    const FaultyStore params{emulator::make_tensor_map(out.values().data(), 2, 64, 16, 1, 128, 2048, 64, 16, true), fault};
    if (fault < static_cast<int>(std::size(messages))) expect_failure(messages[fault], [&] { launch("test_faulty_store", 1, params); });
    else launch("test_faulty_store", 1, params);
  }
}

TEST(tensor_maps) {
  struct Request {
    uint64_t base = 1024, width = 64, height = 64, depth = 2, row = 128, matrix = 8192;
    uint32_t element = 2, box_width = 64, box_height = 64;
    bool swizzled = true;
  };
  const auto make = [](const Request& r) {
    emulator::make_tensor_map(reinterpret_cast<const void*>(r.base), r.element, r.width, r.height, r.depth, r.row, r.matrix, r.box_width,
                              r.box_height, r.swizzled);
  };
  const uint64_t vast = uint64_t{1} << 32;
  make({});
  make({.width = vast, .height = vast, .depth = vast});
  make({.box_width = 256, .box_height = 256, .swizzled = false});
  expect_failure("the base", [&] { make({.base = 1032}); });
  for (const Request& r : {Request{.width = 0}, {.height = 0}, {.depth = 0}, {.width = vast + 1}, {.height = vast + 1}, {.depth = vast + 1}})
    expect_failure("sizes", [&] { make(r); });
  for (const Request& r : {Request{.row = 136}, {.matrix = 8200}, {.row = uint64_t{1} << 40}, {.matrix = uint64_t{1} << 40}})
    expect_failure("strides", [&] { make(r); });
  for (const Request& r : {Request{.box_width = 0}, {.box_height = 0}, {.box_width = 264, .swizzled = false}, {.box_height = 257}})
    expect_failure("sides of the box", [&] { make(r); });
  expect_failure("a row of the box", [&] { make({.box_width = 12}); });
  expect_failure("swizzled", [&] { make({.box_width = 72}); });
  expect_failure("elements", [&] { make({.element = 3}); });
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
  alignas(64) char map[128];
  expect(!emulator_tensor_map(map, map, 2, 64, 64, 1, 128, 8192, 64, 64, 1), "tensor map");
  expect(emulator_tensor_map(map, map, 2, 64, 64, 1, 100, 8192, 64, 64, 1) != nullptr, "wrong stride");
  expect(emulator_tensor_map(map + 16, map, 2, 64, 64, 1, 128, 8192, 64, 64, 1) != nullptr, "misaligned map");
  const FaultyPair pair{{}, {nullptr}, -1};
  expect(!emulator_launch("test_faulty_pair", 2, &pair, sizeof pair), "clusters");
  expect(emulator_launch("test_faulty_pair", 1, &pair, sizeof pair) != nullptr, "half a cluster");
}
