// What a test of kernels needs: problems from a seed, memory that the emulator watches, comparison, and a main().
//
//   TEST(scan_of_ones) {                          // runs once per schedule; random() differs from run to run
//     auto x = input<float>("x", n, [&](int64_t) { return normal(); });
//     auto y = output<float>("y", n);             // poisoned with NaN; each byte is to be written once
//     launch("scan", blocks, ScanParams{x, y, n});
//     expect_close(y, reference, bound);
//   }
//
// A schedule is a Completion, an order of threads and a seed (emulator/settings.h). The command line of a test program:
// [--runs N] [--seed N] [--bug NAME] [--bugs] [--list] [PART OF A TEST'S NAME].
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "emulator/memory.h"
#include "ptx/ptx.cuh"

namespace test {

using emulator::Where;

// Ends the test, which has failed.
[[noreturn]] void failed(const std::string& why, const Where& where);

struct Test {
  std::string name;
  std::function<void()> body;
  Test(const std::string& name, const std::function<void()>& body);
};
#define TEST(name)                                   \
  static void test_##name();                         \
  static const test::Test test_##name##_(#name, test_##name); \
  static void test_##name()

// Seeded by the test's name and the run's seed.
std::mt19937_64& random();
inline int64_t uniform(int64_t low, int64_t high) {  // both included
  return low + static_cast<int64_t>(random()() % static_cast<uint64_t>(high - low + 1));
}
inline float normal() { return std::normal_distribution<float>()(random()); }

// Memory whose last byte lies before a page that may not be touched, registered with the emulator.
class Memory {
 public:
  Memory(const char* name, size_t bytes, emulator::Use use);
  Memory(Memory&& other) noexcept : map_(other.map_), pages_(other.pages_), data_(other.data_), name_(other.name_) { other.map_ = nullptr; }
  Memory& operator=(Memory&&) = delete;
  ~Memory();
  void* data() const { return data_; }
  const char* name() const { return name_; }

 private:
  char* map_;
  size_t pages_;
  void* data_;
  const char* name_;
};

// The elements behind the first `skip` of some memory: without those they start at a multiple of 16 bytes.
template <class T> class Buffer {
 public:
  Buffer(const char* name, int64_t count, emulator::Use use, int64_t skip = 0)
      : memory_(name, (count + skip) * sizeof(T), use), count_(count), skip_(skip) {}
  std::span<T> values() const { return {static_cast<T*>(memory_.data()) + skip_, static_cast<size_t>(count_)}; }
  T& operator[](int64_t i) const { return static_cast<T*>(memory_.data())[skip_ + i]; }
  int64_t size() const { return count_; }
  const char* name() const { return memory_.name(); }
  operator ptx::Global<T>() const { return {values().data()}; }
  operator ptx::Global<const T>() const { return {values().data()}; }
  // Whether the last launch has written every element.
  bool written() const { return emulator::unwritten(memory_.data()) == skip_ * sizeof(T); }

 private:
  Memory memory_;
  int64_t count_, skip_;
};

// T from a float or an integer.
template <class T, class V> T make(V value) {
  if constexpr (std::is_same_v<T, ptx::bf16> || std::is_same_v<T, ptx::f16>) return ptx::from_float<T>(static_cast<float>(value));
  else return static_cast<T>(value);
}
template <class T> double real(T x) {
  if constexpr (std::is_same_v<T, ptx::bf16> || std::is_same_v<T, ptx::f16>) return ptx::to_float(x);
  else return static_cast<double>(x);
}

// Read-only; value(i) is element i.
template <class T, class F> Buffer<T> input(const char* name, int64_t count, F&& value, int64_t skip = 0) {
  Buffer<T> b(name, count, emulator::Use::read_only, skip);
  for (int64_t i = 0; i < count; i++) b[i] = make<T>(value(i));
  return b;
}
// Read-only zeros but for the last ones, value(i) being number i of those: large enough that 32 bits do not count the
// elements, of which only what is touched takes memory.
template <class T, class F> Buffer<T> vast(const char* name, int64_t count, int64_t last, F&& value) {
  if (count >> 32 == 0) failed(std::string(name) + " is not that large", Where::current());
  Buffer<T> b(name, count, emulator::Use::read_only);
  for (int64_t i = 0; i < last; i++) b[count - last + i] = make<T>(value(i));
  return b;
}
// Poisoned: NaN, or -1 in integers.
template <class T> Buffer<T> output(const char* name, int64_t count, int64_t skip = 0) {
  Buffer<T> b(name, count, emulator::Use::write_once, skip);
  memset(b.values().data(), 0xff, count * sizeof(T));
  return b;
}
// What a kernel reads and writes, such as a workspace.
template <class T> Buffer<T> scratch(const char* name, int64_t count, T value, int64_t skip = 0) {
  Buffer<T> b(name, count, emulator::Use::read_write, skip);
  for (T& x : b.values()) x = value;
  return b;
}

template <class Params> void launch(const char* kernel, int64_t blocks, const Params& params) {
  emulator::launch(kernel, blocks, &params, sizeof params);
}

// |got[i] - want(i)| <= bound(i) for all elements; NaN fails.
template <class T, class Want, class Bound>
void expect_close(const Buffer<T>& got, Want&& want, Bound&& bound, Where where = Where::current()) {
  for (int64_t i = 0; i < got.size(); i++) {
    const double g = real(got[i]), w = want(i), b = bound(i);
    if (!(std::fabs(g - w) <= b) && !(g == w))
      failed(std::string(got.name()) + '[' + std::to_string(i) + "] is " + std::to_string(g) + ", not " + std::to_string(w) +
             " within " + std::to_string(b), where);
  }
}
// The same bits.
template <class T, class Want> void expect_equal(const Buffer<T>& got, Want&& want, Where where = Where::current()) {
  for (int64_t i = 0; i < got.size(); i++) {
    const T g = got[i], w = want(i);
    if (memcmp(&g, &w, sizeof(T)))
      failed(std::string(got.name()) + '[' + std::to_string(i) + "] is " + std::to_string(real(g)) + ", not " + std::to_string(real(w)), where);
  }
}
inline void expect(bool holds, const std::string& what, Where where = Where::current()) {
  if (!holds) failed(what, where);
}
// That body() is refused, with a message that contains `part`.
void expect_failure(const std::string& part, const std::function<void()>& body, Where where = Where::current());

// Half a unit in the last place of T relative to the value: what storing a sum rounds away.
template <class T> constexpr double rounding() {
  if constexpr (std::is_same_v<T, ptx::bf16>) return 0x1p-8;
  else if constexpr (std::is_same_v<T, ptx::f16>) return 0x1p-11;
  else return 0x1p-24;
}
// The error of a sum of `terms` products in fp32, stored as T: `value` is the sum, `absolute` that of the absolute values.
template <class T> double sum_bound(double value, double absolute, int64_t terms) {
  return std::fabs(value) * rounding<T>() + absolute * static_cast<double>(terms + 1) * 0x1p-23 + 1e-30;
}

}  // namespace test

using test::expect;
using test::expect_close;
using test::expect_equal;
using test::expect_failure;
using test::input;
using test::launch;
using test::normal;
using test::output;
using test::scratch;
using test::sum_bound;
using test::uniform;
using test::vast;
