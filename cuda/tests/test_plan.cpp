// The planning kernels: equal to fastmoe-core to the bit.
#include "kernels/plan.cu"
#include "tests/plans.h"

using namespace moe;
using test::chance;

namespace {

struct Shape {
  int tokens, experts, top_k;
};

template <class Id> void check_plan(const Shape& shape, bool by_score, bool one_block = false) {
  const bool wide_ids = sizeof(Id) == 8;
  const auto [T, E, K] = shape;
  const int64_t R = static_cast<int64_t>(T) * K;
  const bool limited = by_score || chance(2);
  const int fair = static_cast<int>(R / E + 1);
  const int capacity = limited ? static_cast<int>(uniform(0, chance(2) ? 2 * fair : 1 + fair / 2)) : -1;
  const bool pad = limited && chance(2);
  const int64_t N = pad ? static_cast<int64_t>(E) * capacity : R;
  const bool weighted = by_score || chance(2);

  const int bad_ones = chance(2) ? 0 : static_cast<int>(uniform(2, 20));  // one id in so many is no expert
  const int64_t favourites = uniform(1, E);                               // experts that get most rows
  const int few = static_cast<int>(uniform(1, 6));                        // different weights, or many
  const auto id = [&](int64_t) -> int64_t {
    if (bad_ones && chance(bad_ones)) return chance(2) ? E : wide_ids && chance(2) ? (int64_t{1} << 32) : -uniform(1, 5);
    return chance(4) ? uniform(0, E - 1) : uniform(0, favourites - 1);
  };
  const auto weight = [&](int64_t) { return chance(10) ? NAN : chance(10) ? -0.0f : few < 6 ? static_cast<float>(uniform(0, few)) : normal(); };
  const auto ids = input<Id>("ids", R, id);
  const auto weights = input<float>("weights", R, weight);
  const auto counts = output<int>("counts", E), offsets = output<int>("offsets", E + 1);
  const auto gather = output<int>("gather", N), inverse = output<int>("inverse", R);
  const auto sorted = output<float>("sorted_weights", N);
  const auto bad = scratch<int>("bad_row", 1, INT32_MAX);
  const int64_t tiles = (R + 511) / 512;
  const auto workspace = scratch<int>("workspace", tiles * E + E + (by_score ? R : 0), -12345);
  PlanParams<Id> p{};
  p.ids = ids;
  if (weighted) p.weights = weights, p.sorted_weights = sorted;
  if (by_score && chance(3)) p.sorted_weights = nullptr;
  p.counts = counts, p.offsets = offsets, p.gather = gather, p.inverse = inverse, p.workspace = workspace;
  p.bad_row = chance(4) ? Global<int>(nullptr) : Global<int>(bad);
  p.rows = static_cast<int>(R), p.top_k = K, p.experts = E;
  p.capacity = limited ? capacity : INT32_MAX, p.pad = pad, p.drop_by_score = by_score;
  const std::string suffix = wide_ids ? "_i64" : "_i32";
  const int64_t blocks = std::max<int64_t>(1, chance(2) ? (tiles + 3) / 4 : uniform(1, 3));
  if (one_block) {
    launch(("plan_small" + suffix).c_str(), 1, p);
  } else {
    launch(("plan_count" + suffix).c_str(), blocks, p);
    launch("plan_scan", (E + 31) / 32, p);
    launch(("plan_scatter" + suffix).c_str(), blocks, p);
  }
  if (by_score) launch("plan_seat", chance(2) ? E : uniform(1, E), p);

  std::vector<int64_t> all_ids(R);
  for (int64_t i = 0; i < R; i++) all_ids[i] = ids[i];
  std::vector<int> want_counts(E), want_offsets(E + 1), want_gather(N), want_inverse(R);
  std::vector<float> want_sorted(N);
  const int first_bad = oracle::oracle_plan({T, E, K, capacity, pad, by_score, all_ids.data(), weighted ? weights.values().data() : nullptr,
                                     want_counts.data(), want_offsets.data(), want_gather.data(), want_inverse.data(),
                                     p.sorted_weights ? want_sorted.data() : nullptr});
  expect_equal(counts, [&](int64_t i) { return want_counts[i]; });
  expect_equal(offsets, [&](int64_t i) { return want_offsets[i]; });
  expect_equal(gather, [&](int64_t i) { return want_gather[i]; });
  expect_equal(inverse, [&](int64_t i) { return want_inverse[i]; });
  if (p.sorted_weights) expect_equal(sorted, [&](int64_t i) { return want_sorted[i]; });
  const int want_bad = first_bad < 0 || !p.bad_row ? INT32_MAX : first_bad;
  expect(bad[0] == want_bad, "bad_row is " + std::to_string(bad[0]) + ", not " + std::to_string(want_bad));
}

Shape small() { return {static_cast<int>(uniform(0, 60)), static_cast<int>(uniform(1, 40)), static_cast<int>(uniform(1, 9))}; }
Shape many_tiles() { return {static_cast<int>(uniform(300, 1700)), static_cast<int>(uniform(1, 70)), static_cast<int>(uniform(1, 4))}; }
Shape many_experts() { return {static_cast<int>(uniform(1, 300)), static_cast<int>(uniform(1000, 1100)), static_cast<int>(uniform(1, 3))}; }

}  // namespace

TEST(plan_small) {
  for (int i = 0; i < 10; i++) check_plan<int64_t>(small(), false);
  for (int i = 0; i < 5; i++) check_plan<int32_t>(small(), false);
}
TEST(plan_small_by_score) {
  for (int i = 0; i < 10; i++) check_plan<int64_t>(small(), true);
  for (int i = 0; i < 5; i++) check_plan<int32_t>(small(), true);
}
TEST(plan_one_block) {
  for (int i = 0; i < 4; i++) check_plan<int64_t>(small(), chance(4), true);
  check_plan<int32_t>(small(), chance(4), true);
  check_plan<int64_t>({static_cast<int>(uniform(200, 600)), static_cast<int>(uniform(1, 1024)), 3}, chance(3), true);
}
TEST(plan_many_tiles) {
  check_plan<int64_t>(many_tiles(), false);
  check_plan<int32_t>(many_tiles(), false);
}
TEST(plan_many_tiles_by_score) {
  check_plan<int64_t>(many_tiles(), true);
  check_plan<int32_t>(many_tiles(), true);
}
TEST(plan_many_experts) {
  check_plan<int32_t>(many_experts(), false);
  if (chance(3)) check_plan<int64_t>(many_experts(), true);
}
TEST(plan_more_tiles_than_warps) { check_plan<int64_t>({static_cast<int>(uniform(16000, 20000)), 3, 1}, chance(4)); }
