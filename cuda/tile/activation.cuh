// The activations between the projections, and their derivatives, chosen at run time.
//
// The tanh form of GELU and gpt-oss's swiglu_oai are x sigmoid(x (a + b x^2)); the latter also clamps and adds one to the
// up column. Beside them SiLU, the exact (erf) GELU, and ReLU with its square. Gated ones multiply by the up column.
#pragma once
#include "ptx/ptx.cuh"

namespace tile {
using namespace ptx;

// In the order of fastmoe-cpu's Activation::ALL.
enum class Kind { SWIGLU, GEGLU, GEGLU_TANH, REGLU, SWIGLU_OAI, SILU, GELU, GELU_TANH, RELU, RELU2 };

class Activation {
  static constexpr float LARGEST = 3.402823466e38f;
  struct Value { float value, slope; };

  Kind kind;
  float a, b, limit;  // values above the limit are clamped

  PTX_D float clamp_above(float x) const { return x > limit && !BUG(activation_no_limit) ? limit : x; }
  PTX_D float clamp(float x) const { return clamp_above(x) < -limit ? -limit : clamp_above(x); }

  PTX_D Value sigmoid_form(float x) const {
    const float g = clamp_above(x), square = g * g < LARGEST ? g * g : LARGEST;
    const float s = rcp_approx(1 + exp2_approx(-1.4426950408889634f * (g * (a + b * square))));
    const float slope = s + g * s * (1 - s) * (a + 3 * b * square);
    return {g * s, x > limit && !BUG(activation_slope_of_limit) ? 0 : slope};
  }
  PTX_D static Value silu(float x) {
    const float s = rcp_approx(1 + exp2_approx(-1.4426950408889634f * x)), value = x * s;
    return {value, s + value * (1 - s)};
  }
  PTX_D static Value gelu(float x) {
    const float phi = 0.5f * (1 + ptx::erf(x * 0.70710678118654752f));
    const float density = 0.39894228040143268f * exp2_approx(-0.72134752044448170f * x * x);
    return {x * phi, phi + x * density};
  }
  PTX_D static Value relu(float x, bool squared) {
    const float r = x < 0 ? 0 : x;
    return squared ? Value{r * r, r + r} : Value{r, x > 0 ? 1.0f : 0.0f};
  }

  // One branch, the same for all threads, around the work on many values: body(function, whether it is swiglu_oai).
  template <class Body> PTX_D void with_function(Body body) const {
    using Plain = std::false_type;
    const auto sigmoid = [this](float x) { return sigmoid_form(x); };
    if (kind == Kind::SWIGLU || kind == Kind::SILU) body([](float x) { return silu(x); }, Plain());
    else if (kind == Kind::GEGLU || kind == Kind::GELU) body([](float x) { return gelu(x); }, Plain());
    else if (kind == Kind::REGLU || kind >= Kind::RELU) body([this](float x) { return relu(x, kind == Kind::RELU2); }, Plain());
    else if (kind == Kind::SWIGLU_OAI) body(sigmoid, std::true_type());
    else body(sigmoid, Plain());
  }

 public:
  explicit PTX_D Activation(Kind kind) : kind(kind) {
    const bool oai = kind == Kind::SWIGLU_OAI, tanh = kind == Kind::GEGLU_TANH || kind == Kind::GELU_TANH;
    a = tanh ? 1.5957691216057308f : oai ? 1.702f : 1;  // 2 sqrt(2 / pi), for (1 + tanh(z)) / 2 = sigmoid(2 z)
    b = tanh ? 0.07135481282553254f : 0;                // 0.044715 a
    limit = oai ? 7 : bits_float(0x7f800000);
  }

  PTX_D static constexpr bool gated(Kind kind) { return kind <= Kind::SWIGLU_OAI; }
  PTX_D bool gated() const { return gated(kind); }

  // `up` is not used where ungated.
  template <int N> PTX_D void forward(const float (&gate)[N][2], const float (&up)[N][2], float (&out)[N][2]) const {
    with_function([&](auto function, auto of_gpt_oss) {
      constexpr bool oai = decltype(of_gpt_oss)::value;
#pragma unroll
      for (int i = 0; i < 2 * N; i++) {
        const float value = function(gate[i / 2][i % 2]).value, u = gated() ? up[i / 2][i % 2] : 1;
        out[i / 2][i % 2] = value * (oai ? clamp(u) + 1 : u);
      }
    });
  }

  // From `grad` = dL/d act: `gate` and `up` become their own gradients, `out` the activation.
  template <int N>
  PTX_D void backward(const float (&grad)[N][2], float (&gate)[N][2], float (&up)[N][2], float (&out)[N][2]) const {
    with_function([&](auto function, auto of_gpt_oss) {
      constexpr bool oai = decltype(of_gpt_oss)::value;
#pragma unroll
      for (int i = 0; i < 2 * N; i++) {
        const float d = grad[i / 2][i % 2], u = gated() ? up[i / 2][i % 2] : 1;
        const Value f = function(gate[i / 2][i % 2]);
        const float factor = oai ? clamp(u) + 1 : u;
        out[i / 2][i % 2] = f.value * factor;
        gate[i / 2][i % 2] = d * factor * f.slope;
        up[i / 2][i % 2] = oai && !(clamp(u) == u) ? 0 : d * f.value;
      }
    });
  }
};

}  // namespace tile
