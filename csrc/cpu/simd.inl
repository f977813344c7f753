// The vector type. Included inside the anonymous namespace of an ISA file, which defines BYTES, the vector's size
// (0: plain scalars), and load_partial and store_partial for its tails.
//
// Vectors are the compiler's own (GCC's and clang's vector extensions), so arithmetic is plain operators and one text
// serves every ISA. `Value` wraps one for activations.h: argument-dependent lookup needs a class.

// Of classes there are no vectors: overloads that would take one drop out.
template <class T, int SIZE>
struct Native {};
template <class T, int SIZE>
  requires(SIZE > 0 && !__is_class(T))
struct Native<T, SIZE> {
  typedef T type __attribute__((vector_size(SIZE)));
  typedef T unaligned __attribute__((vector_size(SIZE), aligned(sizeof(T)), may_alias));
};
template <class T>
struct Native<T, 0> {
  using type = T;
  using unaligned = T;
};

// A pair of bfloat16 is loaded, stored and moved as an integer of its size.
template <int SIZE>
struct Native<Pair, SIZE> {
  typedef int32_t type __attribute__((vector_size(SIZE)));
  typedef int32_t unaligned __attribute__((vector_size(SIZE), aligned(alignof(Pair)), may_alias));
};
template <>
struct Native<Pair, 0> {
  using type = int32_t;
  using unaligned = int32_t;
};

template <class T>
using Vector = typename Native<T, BYTES>::type;
template <class T>
constexpr int WIDTH = BYTES == 0 ? 1 : BYTES / static_cast<int>(sizeof(T));

template <class V>
struct Shape;
template <>
struct Shape<Vector<float>> {
  using Lane = float;
  using Bits = Vector<int32_t>;
};
template <>
struct Shape<Vector<double>> {
  using Lane = double;
  using Bits = Vector<int64_t>;
};
template <class V>
using Lane = typename Shape<V>::Lane;
template <class V>
using Bits = typename Shape<V>::Bits;

// x - 0 is x for every x, signed zeros too, so the compiler makes one broadcast of it.
template <class V>
PYPERC_INLINE V splat(Lane<V> x) {
  return x - V{};
}
template <class V>
PYPERC_INLINE Bits<V> bits(V x) {
  Bits<V> y;
  __builtin_memcpy(&y, &x, sizeof(V));
  return y;
}
template <class V>
PYPERC_INLINE V from_bits(Bits<V> x) {
  V y;
  __builtin_memcpy(&y, &x, sizeof(V));
  return y;
}
// Contracted to one instruction where the ISA has it.
template <class V>
PYPERC_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}
template <class M, class V>
PYPERC_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}
// Where an operand is NaN, the second one, as x86's instructions have it.
template <class V>
PYPERC_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
PYPERC_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <class T>
PYPERC_INLINE Vector<T> load(const T* p) {
  return *reinterpret_cast<const typename Native<T, BYTES>::unaligned*>(p);
}
template <class T>
PYPERC_INLINE void store(T* p, Vector<T> v) {
  *reinterpret_cast<typename Native<T, BYTES>::unaligned*>(p) = v;
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

// Lanes I... of a and b taken as one sequence.
template <class V, int... I>
PYPERC_INLINE V shuffle(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Bits<V>{I...});
#endif
}

template <class V, int D, int... I>
PYPERC_INLINE V rotate(V v, Indices<I...>) {
  return shuffle(v, v, Indices<((I + D) % static_cast<int>(sizeof...(I)))...>{});
}

// The sum of the lanes, by halves.
template <class T, int D = WIDTH<T> / 2>
PYPERC_INLINE T sum(Vector<T> v) {
  if constexpr (BYTES == 0) {
    return v;
  } else if constexpr (D == 0) {
    return v[0];
  } else {
    return sum<T, D / 2>(v + rotate<Vector<T>, D>(v, typename MakeIndices<WIDTH<T>>::type{}));
  }
}

// One step of a transpose: blocks of D lanes of rows i and i + D change places.
template <class T, int D, int... I>
PYPERC_INLINE void exchange(Vector<T>& a, Vector<T>& b, Indices<I...>) {
  constexpr int W = WIDTH<T>;
  const Vector<T> low = shuffle(a, b, Indices<((I & D) ? W + I - D : I)...>{});
  b = shuffle(a, b, Indices<((I & D) ? W + I : I + D)...>{});
  a = low;
}
template <class T, int D = WIDTH<T> / 2>
PYPERC_INLINE void transpose(Vector<T> (&rows)[WIDTH<T>]) {
  if constexpr (D > 0) {
    PYPERC_UNROLL
    for (int i = 0; i < WIDTH<T>; ++i) {
      if (!(i & D)) exchange<T, D>(rows[i], rows[i + D], typename MakeIndices<WIDTH<T>>::type{});
    }
    transpose<T, D / 2>(rows);
  }
}
