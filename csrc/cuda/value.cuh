// `Value`, the value type that the activations are written over: a float or a double with operators, and the functions
// that argument-dependent lookup finds. The mathematical functions are those of the device, which are right to one or
// two units in the last place.
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
struct NormalLaw {
  Value<T> cdf, pdf;
};
template <class T>
PYPERC_DEVICE NormalLaw<T> normal_law(Value<T> x) {
  constexpr double SQRT_HALF = 0.70710678118654752440, INV_SQRT_2PI = 0.39894228040143267794;
  return {erfc(x * -SQRT_HALF) * 0.5, exp(x * x * -0.5) * INV_SQRT_2PI};
}

}  // namespace pyperc::cuda
