// `Value`, the value type that the activations are written over: a float or a double with operators, and the functions
// that argument-dependent lookup finds. The mathematical functions are those of the device, which are right to one or
// two units in the last place, but for the normal law in float32.
#pragma once

#include <cmath>

#include "primitives.cuh"

namespace pyperc::cuda {

template <class T>
struct Value {
  T v;
  PYPERC_DEVICE explicit Value(T x) : v(x) {}
  static PYPERC_DEVICE Value of(double x) { return Value(static_cast<T>(x)); }

  friend PYPERC_DEVICE Value operator+(Value a, Value b) { return Value(a.v + b.v); }
  friend PYPERC_DEVICE Value operator-(Value a, Value b) { return Value(a.v - b.v); }
  friend PYPERC_DEVICE Value operator*(Value a, Value b) { return Value(a.v * b.v); }
  friend PYPERC_DEVICE Value operator/(Value a, Value b) { return Value(divide(a.v, b.v)); }
  friend PYPERC_DEVICE Value operator+(Value a, double b) { return a + of(b); }
  friend PYPERC_DEVICE Value operator-(Value a, double b) { return a - of(b); }
  friend PYPERC_DEVICE Value operator-(double a, Value b) { return of(a) - b; }
  friend PYPERC_DEVICE Value operator*(Value a, double b) { return a * of(b); }
  friend PYPERC_DEVICE Value operator/(Value a, double b) { return a / of(b); }
  friend PYPERC_DEVICE bool operator<(Value a, double b) { return a.v < of(b).v; }
  friend PYPERC_DEVICE bool operator<=(Value a, double b) { return a.v <= of(b).v; }
  friend PYPERC_DEVICE bool operator>(Value a, double b) { return a.v > of(b).v; }
  friend PYPERC_DEVICE bool operator>=(Value a, double b) { return a.v >= of(b).v; }
};

template <class T>
PYPERC_DEVICE Value<T> where(bool mask, Value<T> a, Value<T> b) {
  return mask ? a : b;
}
template <class T>
PYPERC_DEVICE Value<T> zeros_like(Value<T>) {
  return Value<T>(0);
}

#define PYPERC_LIFT(function)                                                                      \
  PYPERC_DEVICE Value<float> function(Value<float> x) { return Value<float>(::function##f(x.v)); } \
  PYPERC_DEVICE Value<double> function(Value<double> x) { return Value<double>(::function(x.v)); }
PYPERC_LIFT(exp)
PYPERC_LIFT(expm1)
PYPERC_LIFT(log1p)
PYPERC_LIFT(tanh)
PYPERC_LIFT(erfc)
#undef PYPERC_LIFT

template <class T>
PYPERC_DEVICE Value<T> sigmoid(Value<T> x) {
  return Value<T>(1) / (exp(zeros_like(x) - x) + 1.0);
}
template <class T>
PYPERC_DEVICE Value<T> softplus(Value<T> x) {
  const Value<T> zero = zeros_like(x);
  return where(x > 0.0, x, zero) + log1p(exp(where(x > 0.0, zero - x, x)));
}

template <class T>
struct NormalLaw {
  Value<T> cdf, pdf;
};
PYPERC_DEVICE NormalLaw<double> normal_law(Value<double> x) {
  constexpr double SQRT_HALF = 0.70710678118654752440, INV_SQRT_2PI = 0.39894228040143267794;
  return {erfc(x * -SQRT_HALF) * 0.5, exp(x * x * -0.5) * INV_SQRT_2PI};
}
// By powers of two of polynomials, those of csrc/cpu/math.inl: a third of the instructions of erfc and exp, with which
// gelu would be slower than memory.
PYPERC_DEVICE NormalLaw<float> normal_law(Value<float> x) {
  constexpr float FURTHEST = 10.5673695f;
  constexpr float C[] = {-1,
                         -1.15110791f,
                         -0.459178537f,
                         -0.0526010953f,
                         0.00723186182f,
                         -0.000275892875f,
                         -0.000125469756f,
                         2.60955821e-05f,
                         -1.69514544e-06f};
  const float size = fabsf(x.v), a = size > FURTHEST ? FURTHEST : size;  // a NaN stays
  float g = C[8];
  PYPERC_UNROLL
  for (int i = 7; i >= 0; --i) g = g * a + C[i];
  const float tail = power_of_two(g), density = power_of_two(x.v * x.v * -0.72134752f - 1.32574806f);
  return {Value<float>(x.v < 0 ? tail : 1 - tail), Value<float>(density)};
}

}  // namespace pyperc::cuda
