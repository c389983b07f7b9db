// Numbers in float64 together with how far float arithmetic may be from them: bounds from theory, carried along.
#pragma once
#include "tests/harness.h"
#include "tile/activation.cuh"

namespace test {

constexpr double UNIT = 0x1p-24;  // half a unit in the last place of a float

struct Near {
  double value = 0, error = 0;
};
inline Near rounded(double value, double error) { return {value, error + (std::fabs(value) + error) * UNIT}; }
inline Near operator+(Near a, Near b) { return rounded(a.value + b.value, a.error + b.error); }
inline Near operator*(Near a, Near b) {
  return rounded(a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
}

// A sum of products, begun with `start`, added in float in any order; the factors of tf32 products are rounded before.
class Sum {
  double value_, absolute_;
  int64_t terms_ = 1;

 public:
  explicit Sum(double start = 0) : value_(start), absolute_(std::fabs(start)) {}
  void add(double term) {
    value_ += term;
    absolute_ += std::fabs(term);
    terms_++;
  }
  Near near(bool tf32 = false) const {
    return {value_, absolute_ * (static_cast<double>(terms_ + 1) * 2 * UNIT + (tf32 ? 0x1.01p-10 : 0)) + 1e-30};
  }
};

// Element i is what is stored of a number near want(i): NaN where that is NaN.
template <class T, class Want> void expect_all_near(const Buffer<T>& got, Want&& want, Where where = Where::current()) {
  for (int64_t i = 0; i < got.size(); i++) {
    const Near w = want(i);
    const double g = real(got[i]), bound = w.error + (std::fabs(w.value) + w.error) * rounding<T>() + (sizeof(T) == 2 ? 0x1p-25 : 0);
    if (std::isnan(w.value) ? !std::isnan(g) : !(std::fabs(g - w.value) <= bound))
      failed(std::string(got.name()) + '[' + std::to_string(i) + "] is " + std::to_string(g) + ", not " + std::to_string(w.value) +
             " within " + std::to_string(bound), where);
  }
}
// And every element has been written.
template <class T, class Want> void expect_near(const Buffer<T>& got, Want&& want, Where where = Where::current()) {
  if (!got.written()) failed(std::string(got.name()) + " has elements that were not written", where);
  expect_all_near(got, want, where);
}

// An activation between the projections, as tile/activation.cuh defines it, and the errors of its approximations.
class Reference {
  tile::Kind kind_;
  bool oai_, tanh_;
  double limit_;

 public:
  struct Curve { Near value, slope; };

  explicit Reference(tile::Kind kind)
      : kind_(kind), oai_(kind == tile::Kind::SWIGLU_OAI), tanh_(kind == tile::Kind::GEGLU_TANH || kind == tile::Kind::GELU_TANH),
        limit_(oai_ ? 7 : INFINITY) {}

  tile::Kind kind() const { return kind_; }
  bool gated() const { return tile::Activation::gated(kind_); }

  Curve at(double x) const {
    using enum tile::Kind;
    if (kind_ == REGLU || kind_ == RELU) return {{x < 0 ? 0 : x, 0}, {x > 0 ? 1.0 : 0.0, 0}};
    if (kind_ == RELU2) return {rounded(x < 0 ? 0 : x * x, 0), {x < 0 ? 0 : 2 * x, 0}};
    if (kind_ == GEGLU || kind_ == GELU) {
      const double phi = 0.5 * (1 + std::erf(x * M_SQRT1_2)), density = std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
      const double density_error = std::fabs(x) * density * (3 * x * x + 8) * UNIT;
      return {rounded(x * phi, std::fabs(x) * 4 * UNIT), rounded(phi + x * density, density_error + 5 * UNIT)};
    }
    const double a = tanh_ ? std::sqrt(8 / M_PI) : oai_ ? 1.702 : 1, b = tanh_ ? 0.044715 * a : 0;
    const double g = x > limit_ ? limit_ : x, z = g * (a + b * g * g), s = 1 / (1 + std::exp(-z)), steep = g * (a + 3 * b * g * g);
    const double relative = (12 + 6 * std::fabs(z)) * UNIT;
    const double slope_error = s * relative + std::fabs(steep) * (6 * UNIT + std::exp(-std::fabs(z)) * relative);
    return {{g * s, std::fabs(g * s) * relative + 1e-30}, {x > limit_ ? 0 : s + steep * s * (1 - s), slope_error + 1e-30}};
  }
  // Of a gate that is itself not exact: no slope but that of the square is above 1.13.
  Near gate(Near x) const {
    const Near value = at(x.value).value;
    return {value.value, 1.1 * value.error + x.error * (kind_ == tile::Kind::RELU2 ? 2 * (std::fabs(x.value) + x.error) : 1.13)};
  }
  // What the gate is multiplied by.
  Near factor(Near up) const {
    if (!gated()) return {1, 0};
    return oai_ ? Near{up.value > 7 ? 7 : up.value < -7 ? -7 : up.value, up.error} + Near{1, 0} : up;
  }
  // Whether the gate's activation goes on to the gradient of the up column.
  bool passes(double up) const { return !oai_ || (up <= 7 && up >= -7); }

  Near operator()(Near gate_column, Near up_column) const { return gate(gate_column) * factor(up_column); }
};

}  // namespace test
