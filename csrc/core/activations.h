// The activations: one struct each, and the one list of them. Every backend, every name and every test follows from
// here.
//
// An activation is x = f(s). `f` and `backward` are written once over a value type V, which a backend supplies with the
// operators + - * / and comparisons, and with where, zeros_like, exp, expm1, log1p, tanh, sigmoid, softplus and
// normal_law (whose result has members cdf and pdf), found by argument-dependent lookup: a SIMD vector, a float on a
// GPU, or a torch tensor (for derivatives of any order).
//   f(s, p)               the activation
//   backward(dx, saved, p) ds = dx * f'(s), where `saved` is x for Saved::Output, s for Saved::Summation, anything for
//   Saved::Nothing.
// It is a product only where torch's own derivative is one: relu's masks instead, so that an infinite dx gives 0, not
// NaN. Names and parameters are those of torch.nn.functional.
#pragma once

#include "platform.h"

namespace pyperc {

enum class Saved { Nothing, Output, Summation };

// Where the epilogue applies f: on the accumulators, or on the finished tile while it is in the first-level cache.
// Registers costs one more set of microkernels, so it is for what takes an instruction or two.
enum class Epilogue { Registers, Tile };

struct Parameter {
  const char* name;
  double value;
};

inline constexpr int MAX_PARAMETERS = 2;

struct Parameters {
  double value[MAX_PARAMETERS];
};

struct ActivationDefaults {
  static constexpr Saved saved = Saved::Output;
  static constexpr Epilogue epilogue = Epilogue::Tile;
  static constexpr Parameter parameters[MAX_PARAMETERS] = {};
  // Whether backward holds for these parameters; where not, the network is composed of ATen operations.
  static constexpr bool fusible(const Parameters&) { return true; }
};

struct Identity : ActivationDefaults {
  static constexpr const char* name = "identity";
  static constexpr Saved saved = Saved::Nothing;
  static constexpr Epilogue epilogue = Epilogue::Registers;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return s;
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V, const Parameters&) {
    return dx;
  }
};

struct Relu : ActivationDefaults {
  static constexpr const char* name = "relu";
  static constexpr Epilogue epilogue = Epilogue::Registers;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return where(s <= 0.0, zeros_like(s), s);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V x, const Parameters&) {
    return where(x <= 0.0, zeros_like(dx), dx);
  }
};

// p = {negative_slope}; its derivative is read from the output, whose sign is that of s where negative_slope >= 0.
struct LeakyRelu : ActivationDefaults {
  static constexpr const char* name = "leaky_relu";
  static constexpr Parameter parameters[MAX_PARAMETERS] = {{"negative_slope", 0.01}};
  static constexpr bool fusible(const Parameters& p) { return p.value[0] >= 0; }
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters& p) {
    return where(s > 0.0, s, s * p.value[0]);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V x, const Parameters& p) {
    return where(x > 0.0, dx, dx * p.value[0]);
  }
};

// alpha (e^s - 1) for s <= 0. f' = alpha e^s is read from s: from the output, x + alpha, it would be 0 where e^s < eps.
struct Elu : ActivationDefaults {
  static constexpr const char* name = "elu";
  static constexpr Saved saved = Saved::Summation;
  static constexpr Parameter parameters[MAX_PARAMETERS] = {{"alpha", 1.0}};
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters& p) {
    return where(s > 0.0, s, expm1(where(s > 0.0, zeros_like(s), s)) * p.value[0]);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V s, const Parameters& p) {
    return where(s > 0.0, dx, dx * p.value[0] * exp(where(s > 0.0, zeros_like(s), s)));
  }
};

// log(1 + e^(beta s)) / beta, and s itself where beta s > threshold.
struct Softplus : ActivationDefaults {
  static constexpr const char* name = "softplus";
  static constexpr Saved saved = Saved::Summation;
  static constexpr Parameter parameters[MAX_PARAMETERS] = {{"beta", 1.0}, {"threshold", 20.0}};
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters& p) {
    const V z = s * p.value[0];
    return where(z > p.value[1], s, softplus(z) / p.value[0]);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V s, const Parameters& p) {
    const V z = s * p.value[0];
    const V e = exp(where(z > 40.0, zeros_like(z) + 40.0, z));  // from where e / (e + 1) is 1 on e does not overflow
    return where(z > p.value[1], dx, dx * e / (e + 1.0));
  }
};

struct Tanh : ActivationDefaults {
  static constexpr const char* name = "tanh";
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return tanh(s);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V x, const Parameters&) {
    return dx * (1.0 - x * x);
  }
};

struct Sigmoid : ActivationDefaults {
  static constexpr const char* name = "sigmoid";
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return sigmoid(s);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V x, const Parameters&) {
    return dx * ((1.0 - x) * x);
  }
};

// s Phi(s), Phi the distribution function of the normal law; a tensor's is composed of torch's own operations.
struct Gelu : ActivationDefaults {
  static constexpr const char* name = "gelu";
  static constexpr Saved saved = Saved::Summation;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return s * normal_law(s).cdf;
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V s, const Parameters&) {
    const auto [cdf, pdf] = normal_law(s);
    return dx * (cdf + s * pdf);
  }
};

// gelu(approximate="tanh"): s/2 (1 + tanh(u)) = s sigmoid(2u), u = sqrt(2/pi) (s + 0.044715 s^3); Hendrycks and Gimpel,
// 2016. In this form nothing cancels where s < 0.
struct GeluTanh : ActivationDefaults {
  static constexpr const char* name = "gelu_tanh";
  static constexpr Saved saved = Saved::Summation;
  static constexpr double TWICE_SQRT_2_OVER_PI = 1.59576912160573071176;
  static constexpr double CUBIC = 0.044715;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return s * gate(s, s * s);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V s, const Parameters&) {
    const V s2 = s * s, g = gate(s, s2);
    const V slope = (s2 * (3.0 * CUBIC) + 1.0) * TWICE_SQRT_2_OVER_PI;
    return dx * (g + s * (g * (1.0 - g)) * slope);
  }

 private:
  template <class V>
  static PYPERC_INLINE V gate(V s, V s2) {
    return sigmoid((s2 * CUBIC + 1.0) * TWICE_SQRT_2_OVER_PI * s);
  }
};

// s sigmoid(s): -inf gives NaN, as it does in torch.
struct Silu : ActivationDefaults {
  static constexpr const char* name = "silu";
  static constexpr Saved saved = Saved::Summation;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return s * sigmoid(s);
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V s, const Parameters&) {
    const V g = sigmoid(s);
    return dx * g * (s * (1.0 - g) + 1.0);
  }
};

struct Hardtanh : ActivationDefaults {
  static constexpr const char* name = "hardtanh";
  static constexpr Parameter parameters[MAX_PARAMETERS] = {{"min_val", -1.0}, {"max_val", 1.0}};
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters& p) {
    const V low = zeros_like(s) + p.value[0], high = zeros_like(s) + p.value[1];
    return where(s <= p.value[0], low, where(s >= p.value[1], high, s));
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V x, const Parameters& p) {
    return where(x > p.value[0], where(x < p.value[1], dx, zeros_like(dx)), zeros_like(dx));
  }
};

// The threshold units of lecture 3.1: 1{s >= 0}, and sign with sign(0) = +1; NaN stays NaN, the derivative is zero.
struct Heaviside : ActivationDefaults {
  static constexpr const char* name = "heaviside";
  static constexpr Saved saved = Saved::Nothing;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return where(s >= 0.0, zeros_like(s) + 1.0, where(s < 0.0, zeros_like(s), s));
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V, const Parameters&) {
    return zeros_like(dx);
  }
};

struct Sign : ActivationDefaults {
  static constexpr const char* name = "sign";
  static constexpr Saved saved = Saved::Nothing;
  template <class V>
  static PYPERC_INLINE V f(V s, const Parameters&) {
    return where(s >= 0.0, zeros_like(s) + 1.0, where(s < 0.0, zeros_like(s) - 1.0, s));
  }
  template <class V>
  static PYPERC_INLINE V backward(V dx, V, const Parameters&) {
    return zeros_like(dx);
  }
};

#define PYPERC_ACTIVATIONS(X) \
  X(Identity)                 \
  X(Relu)                     \
  X(LeakyRelu)                \
  X(Elu)                      \
  X(Softplus)                 \
  X(Tanh)                     \
  X(Sigmoid)                  \
  X(Gelu)                     \
  X(GeluTanh)                 \
  X(Silu)                     \
  X(Hardtanh)                 \
  X(Heaviside)                \
  X(Sign)

enum class Activation : int {
#define X(A) A,
  PYPERC_ACTIVATIONS(X)
#undef X
};

constexpr Saved saved_of(Activation activation) {
#define X(A) A::saved,
  constexpr Saved saved[] = {PYPERC_ACTIVATIONS(X)};
#undef X
  return saved[static_cast<int>(activation)];
}

#define X(A) +1
inline constexpr int ACTIVATION_COUNT = 0 PYPERC_ACTIVATIONS(X);
#undef X

}  // namespace pyperc
