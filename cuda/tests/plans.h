// Random routing plans, made by fastmoe-core, for kernels that follow one.
#pragma once
#include <algorithm>
#include <vector>

#include "tests/harness.h"
#include "tests/oracle/oracle.h"

namespace test {

inline bool chance(int of) { return uniform(1, of) == 1; }
template <class T> T any_of(std::initializer_list<T> values) { return values.begin()[uniform(0, values.size() - 1)]; }

struct Plan {
  int T, E, K, N;
  std::vector<int64_t> ids;                           // [T, K], some of them out of range
  std::vector<float> weights, sorted_weights;         // [T, K], [N]
  std::vector<int> counts, offsets, gather, inverse;  // [E], [E + 1], [N], [T, K]

  Buffer<int> input_of(const char* name, const std::vector<int>& values) const {
    return input<int>(name, values.size(), [&](int64_t i) { return values[i]; });
  }
  Buffer<float> input_of(const char* name, const std::vector<float>& values) const {
    return input<float>(name, values.size(), [&](int64_t i) { return values[i]; });
  }
};

// With dropped rows, padding, experts without rows and ids out of range, each now and then.
inline Plan some_plan(int T, int E, int K) {
  Plan p{T, E, K, T * K, {}, {}, {}, {}, {}, {}, {}};
  const bool limited = chance(2), pad = limited && chance(2), strays = chance(2);
  const int64_t favourites = uniform(1, E);
  const int capacity = limited ? static_cast<int>(uniform(0, 2 * (p.N / E + 1))) : -1;
  if (pad) p.N = E * capacity;
  for (int i = 0; i < T * K; i++) {
    p.ids.push_back(strays && chance(8) ? -1 : chance(3) ? uniform(0, E - 1) : uniform(0, favourites - 1));
    p.weights.push_back(normal());
  }
  p.counts.resize(E), p.offsets.resize(E + 1), p.gather.resize(p.N), p.inverse.resize(T * K), p.sorted_weights.resize(p.N);
  oracle::oracle_plan({T, E, K, capacity, pad, 0, p.ids.data(), p.weights.data(), p.counts.data(), p.offsets.data(),
                       p.gather.data(), p.inverse.data(), p.sorted_weights.data()});
  return p;
}

}  // namespace test
