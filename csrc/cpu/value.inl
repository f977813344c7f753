// `Value`, the value type that the activations are written over: one vector with operators, and the functions that
// argument-dependent lookup finds. Included inside the anonymous namespace of an ISA file, after math.inl.

template <class T>
struct Value {
  using V = Vector<T>;
  V v;
  PYPERC_INLINE explicit Value(V x) : v(x) {}
  static PYPERC_INLINE Value of(double x) { return Value(splat<V>(static_cast<T>(x))); }

  friend PYPERC_INLINE Value operator+(Value a, Value b) { return Value(a.v + b.v); }
  friend PYPERC_INLINE Value operator-(Value a, Value b) { return Value(a.v - b.v); }
  friend PYPERC_INLINE Value operator*(Value a, Value b) { return Value(a.v * b.v); }
  friend PYPERC_INLINE Value operator/(Value a, Value b) { return Value(a.v / b.v); }
  friend PYPERC_INLINE Value operator+(Value a, double b) { return a + of(b); }
  friend PYPERC_INLINE Value operator-(Value a, double b) { return a - of(b); }
  friend PYPERC_INLINE Value operator-(double a, Value b) { return of(a) - b; }
  friend PYPERC_INLINE Value operator*(Value a, double b) { return a * of(b); }
  friend PYPERC_INLINE Value operator/(Value a, double b) { return a / of(b); }
  friend PYPERC_INLINE auto operator<(Value a, double b) { return a.v < of(b).v; }
  friend PYPERC_INLINE auto operator<=(Value a, double b) { return a.v <= of(b).v; }
  friend PYPERC_INLINE auto operator>(Value a, double b) { return a.v > of(b).v; }
  friend PYPERC_INLINE auto operator>=(Value a, double b) { return a.v >= of(b).v; }
};

template <class M, class T>
PYPERC_INLINE Value<T> where(M mask, Value<T> a, Value<T> b) {
  return Value<T>(select(mask, a.v, b.v));
}
template <class T>
PYPERC_INLINE Value<T> zeros_like(Value<T>) {
  return Value<T>(Vector<T>{});
}

template <class T>
PYPERC_INLINE Value<T> sqrt(Value<T> x) {
  return Value<T>(square_root(x.v));
}

#define PYPERC_LIFT(function)                   \
  template <class T>                            \
  PYPERC_INLINE Value<T> function(Value<T> x) { \
    return Value<T>(math::function(x.v));       \
  }
PYPERC_LIFT(exp)
PYPERC_LIFT(expm1)
PYPERC_LIFT(log1p)
PYPERC_LIFT(tanh)
PYPERC_LIFT(sigmoid)
PYPERC_LIFT(softplus)
#undef PYPERC_LIFT

template <class T>
struct NormalLaw {
  Value<T> cdf, pdf;
};
template <class T>
PYPERC_INLINE NormalLaw<T> normal_law(Value<T> x) {
  const auto [cdf, pdf] = math::normal_law(x.v);
  return {Value<T>(cdf), Value<T>(pdf)};
}
