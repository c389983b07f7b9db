// Problems for the grouped products: an entry point, rows of experts, and operands of which parts are NaN.
#pragma once
#include <climits>
#include <cstdio>

#include "emulator/launch.h"
#include "emulator/settings.h"
#include "tests/near.h"
#include "tests/plans.h"
#include "tile/shape.cuh"

namespace test {

// An entry point, <family>_<math>_<BM>x<BN>_<variant> or <family>_wgmma_..., and sizes that it takes: any, or whole 16 bytes.
struct Entry {
  std::string name, math, variant;
  int BM, BN;
  int index = 0;   // among those of its family
  int stages = 2;  // of its ring

  bool any() const { return variant == "any"; }
  bool warpgroups() const { return name.find("_wgmma_") != std::string::npos; }
  bool tf32() const { return math == "tf32"; }
  // Every activation in turn, over the entry points and over the runs.
  Reference activation() const { return Reference(static_cast<tile::Kind>((index + emulator::settings.seed) % 10)); }
  // Elements before a tensor.
  int64_t skip() const { return any() && chance(2); }
  template <class T> int size(int about) const {
    const int unit = any() ? 1 : 16 / static_cast<int>(sizeof(T));
    return std::max(unit, about / unit * unit);
  }
  // Up to more than two rounds of the ring.
  template <class T> int depth() const {
    const int slice = 64 / static_cast<int>(sizeof(T));
    return size<T>(any_of({1, slice - 1, slice, 2 * slice + 9, stages * slice, (2 * stages + 1) * slice + 13}));
  }
  // In turn, with what ends in either half of a tile.
  template <class T> int width() const {
    const int half = BN / 2, quarter = BN / 4;
    const int widths[] = {1, quarter - 1, quarter, half, BN - 3, BN + quarter + 8, BN + half - 1, BN + half + 8, 2 * BN + 9};
    return size<T>(widths[(index + emulator::settings.seed) % std::size(widths)]);
  }
};

// A test for every entry point of a family; check.operator()<Math>(entry) is one problem.
template <class Check> bool test_entries(const std::string& family, Check check) {
  int index = 0;
  for (const emulator::Kernel* kernel : emulator::kernels()) {
    char math[8], variant[8];
    Entry entry{kernel->name, "", "", 0, 0, index++};
    const auto is_of = [&](const std::string& prefix) {
      return sscanf(kernel->name, (prefix + "_%7[a-z0-9]_%dx%d_%7s").c_str(), math, &entry.BM, &entry.BN, variant) == 4;
    };
    if (!is_of(family) && !is_of(family + "_wgmma")) continue;
    entry.stages = static_cast<int>(kernel->shared_bytes) / (64 * (entry.BM + entry.BN));
    entry.math = math, entry.variant = variant;
    Test(kernel->name, [=] {
      if (entry.math == "bf16") check.template operator()<bf16>(entry);
      else if (entry.math == "f16") check.template operator()<f16>(entry);
      else if (entry.tf32()) check.template operator()<tile::tf32>(entry);
      else check.template operator()<float>(entry);
    });
  }
  return true;
}

template <class T> std::vector<double> reals(std::span<T> values) {
  std::vector<double> all;
  for (T value : values) all.push_back(real(value));
  return all;
}
template <class T> std::vector<double> reals(const Buffer<T>& buffer) { return reals(buffer.values()); }

// A matrix [rows, columns] that may be gathered; a row that `gather` does not name is one of zeros.
struct Operand {
  std::vector<double> values, zeros;
  std::vector<int> gather;
  int64_t columns;

  const double* operator[](int row) const {
    if (gather.empty()) return &values[row * columns];
    const int at = gather[row];
    return at >= 0 && at < static_cast<int64_t>(values.size()) / columns ? &values[at * columns] : zeros.data();
  }
};
template <class T> Operand operand(const Buffer<T>& values, int columns, const std::vector<int>& gather) {
  return {reals(values), std::vector<double>(columns), gather, columns};
}

// Weights [E, N, K], transposed [E, K, N].
struct Weights {
  std::vector<double> values;
  int64_t n, k;
  bool transposed;

  // start + <row, column c of expert e>.
  Near product(const double* row, int e, int c, double start, bool tf32) const {
    const double* w = &values[e * n * k + (transposed ? c : c * k)];
    Sum sum(start);
    for (int64_t i = 0; i < k; i++) sum.add(row[i] * w[transposed ? i * n : i]);
    return sum.near(tf32);
  }
};

// Sorted rows, some behind those of the last expert. All that belongs to the expert `spoilt` is NaN, as is token 0, which
// is that expert's alone; so is what lies behind the last expert.
struct SortedRows {
  std::vector<int> offsets{0}, gather;  // [E + 1], [R]
  int rows = 0, tokens = 0, spoilt = -1;

  int experts() const { return static_cast<int>(offsets.size()) - 1; }
  // E behind the last.
  int expert(int row) const {
    return static_cast<int>(std::upper_bound(offsets.begin(), offsets.end(), row) - offsets.begin()) - 1;
  }
  bool used(int row) const { return expert(row) < experts(); }

  Buffer<int> offsets_input() const {
    return input<int>("offsets", offsets.size(), [&](int64_t i) { return offsets[i]; });
  }
  Buffer<int> gather_input() const {
    return input<int>("gather", rows, [&](int64_t i) { return gather[i]; });
  }
  // [T, columns] or [R, columns]; `behind`: what lies behind the last expert.
  template <class T> Buffer<T> input_rows(const char* name, int columns, bool gathered, int64_t skip = 0, float behind = NAN) const {
    return input<T>(name, static_cast<int64_t>(gathered ? tokens : rows) * columns, [&](int64_t i) {
      const int row = static_cast<int>(i / columns);
      if (gathered) return row == 0 ? NAN : normal();
      return expert(row) == spoilt ? NAN : used(row) ? normal() : behind;
    }, skip);
  }
  // [E, size].
  template <class T> Buffer<T> of_experts(const char* name, int64_t size, int64_t skip, double scale = 1) const {
    return input<T>(name, experts() * size, [&](int64_t i) { return i / size == spoilt ? NAN : static_cast<float>(scale) * normal(); }, skip);
  }
};

// As many rows as make a quick test of products of `work` multiplications a row.
inline SortedRows some_rows(int64_t work) {
  SortedRows s;
  const bool crowd = work < 6000 && chance(3);  // more experts than lanes of a warp
  const int experts = crowd ? 70 : any_of({1, 2, 3, 5});
  int left = static_cast<int>(std::clamp<int64_t>(5'000'000 / std::max<int64_t>(work, 1), 70, 340));
  for (int e = 0; e < experts; e++) {
    const int size = crowd && !chance(20) ? chance(6) : any_of({0, 0, 1, 5, 31, 63, 64, 65, 127, 128, 129, 300});
    s.offsets.push_back(s.offsets.back() + std::min(size, left));
    left -= s.offsets[e + 1] - s.offsets[e];
  }
  s.rows = s.offsets.back() + any_of({0, 0, 3, 70, 130});
  s.tokens = any_of({0, 2, 9, 100});
  if (s.tokens && chance(2)) s.spoilt = static_cast<int>(uniform(0, experts - 1));
  for (int row = 0; row < s.rows; row++) {
    const bool none = s.tokens == 0 || !s.used(row) || (chance(6) && s.expert(row) != s.spoilt);
    s.gather.push_back(none ? any_of({-1, -1, -7, s.tokens, INT_MAX}) : s.expert(row) == s.spoilt ? 0 : static_cast<int>(uniform(1, s.tokens - 1)));
  }
  return s;
}

}  // namespace test
