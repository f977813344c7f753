// The 16-bit formats: loads that widen to float32, stores that round to it, and the packing of both kinds of operands.
// Included inside the anonymous namespace of an ISA file after gemm.inl and pack.inl; the file defines `load` and
// `store` for Half.
//
//   widened   b as float32, in panels as in gemm.inl; the product is that of float32
//   paired    b as pairs of bfloat16, which vdpbf16ps multiplies and sums two at a time; memory holds what it takes:
//
//             row 2p    b00 b01 b02 ...        panel   b00 b10 b01 b11 b02 b12 ...     p = 0
//             row 2p+1  b10 b11 b12 ...                b20 b30 ...                     p = 1
//
//             where b is a transpose, the pairs already stand side by side, and 32-bit elements are transposed

PYPERC_INLINE Vector<uint32_t> words_of(Vector<float> x) {
  Vector<uint32_t> y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}
PYPERC_INLINE Vector<float> float_of(Vector<uint32_t> x) {
  Vector<float> y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// As many 16-bit words as a vector has lanes, and the lower half of each lane.
using Words = Native<uint16_t, BYTES / 2>::type;
PYPERC_INLINE uint32_t to_lanes(uint16_t h) { return h; }
PYPERC_INLINE uint16_t to_words(uint32_t x) { return static_cast<uint16_t>(x); }
template <class H, int SIZE = BYTES>
PYPERC_INLINE Vector<uint32_t> to_lanes(H h) {
  return __builtin_convertvector(h, typename Native<uint32_t, SIZE>::type);
}
template <class V, int SIZE = BYTES / 2>
PYPERC_INLINE Words to_words(V x) {
  return __builtin_convertvector(x, typename Native<uint16_t, SIZE>::type);
}
PYPERC_INLINE Vector<uint32_t> load_lower(const BFloat16* p) {
  Words h;
  __builtin_memcpy(&h, p, sizeof(h));
  return to_lanes(h);
}

PYPERC_INLINE Vector<float> load(const BFloat16* p) { return float_of(load_lower(p) << 16); }

// To nearest, ties to even: a half of the last place less one is added, and one more where the last bit is odd. A NaN,
// which the sum could carry into infinity, becomes the quiet one. Where there is `convert`, it has the ordinary
// numbers.
template <class V>
PYPERC_INLINE void round_to(BFloat16* p, V x) {
  if constexpr (HAS_PAIRS<BFloat16> && sizeof(V) > 0) {
    if (convert(p, x)) return;
  }
  const Vector<uint32_t> b = words_of(x);
  const Vector<uint32_t> rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const Vector<uint32_t> nan = Vector<uint32_t>{} + 0x7fc0u;
  const Words h = to_words(x == x ? rounded : nan);
  __builtin_memcpy(p, &h, sizeof(h));
}
PYPERC_INLINE void store(BFloat16* p, Vector<float> x) { round_to(p, x); }

// The first n of a vector, by way of a whole one.
template <class S>
PYPERC_INLINE Vector<float> load_first(const S* p, int n) {
  S whole[WIDTH<float>] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(static_cast<const S*>(whole));
}
template <class S>
PYPERC_INLINE void store_first(S* p, Vector<float> x, int n) {
  S whole[WIDTH<float>];
  store(static_cast<S*>(whole), x);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

template <class S>
void widen(int64_t rows, int64_t columns, const S* in, int64_t ld_in, float* out, int64_t ld_out) {
  constexpr int W = WIDTH<float>;
  for (int64_t i = 0; i < rows; ++i, in += ld_in, out += ld_out) {
    int64_t j = 0;
    for (; j + W <= columns; j += W) store(out + j, load(in + j));
    if (const int tail = static_cast<int>(columns - j)) store_partial(out + j, load_first(in + j, tail), tail);
  }
}
template <class S>
void narrow(int64_t rows, int64_t columns, const float* in, int64_t ld_in, S* out, int64_t ld_out) {
  constexpr int W = WIDTH<float>;
  for (int64_t i = 0; i < rows; ++i, in += ld_in, out += ld_out) {
    int64_t j = 0;
    for (; j + W <= columns; j += W) store(out + j, load(in + j));
    if (const int tail = static_cast<int>(columns - j)) store_first(out + j, load_partial(in + j, tail), tail);
  }
}

// Operand E number p along k of column j, of which k terms exist; b's terms lie rs apart.
template <class S>
PYPERC_INLINE float operand(const S* b, int64_t, int64_t, float) {
  float wide[WIDTH<float>];
  store(static_cast<float*>(wide), load_first(b, 1));
  return wide[0];
}
PYPERC_INLINE Pair operand(const BFloat16* b, int64_t rs, int64_t terms, Pair) {
  return {b->bits | (terms > 1 ? static_cast<uint32_t>(b[rs].bits) << 16 : 0)};
}

// A vector of operands: of W columns at one p (`terms` of it exist), or of one column at W values of p.
template <class S>
PYPERC_INLINE Vector<float> operands_across(const S* b, int64_t, int64_t, float) {
  return load(b);
}
PYPERC_INLINE Vector<float> operands_across(const BFloat16* b, int64_t rs, int64_t terms, Pair) {
  return float_of(terms > 1 ? load_lower(b) | load_lower(b + rs) << 16 : load_lower(b));
}
template <class S>
PYPERC_INLINE Vector<float> operands_along(const S* b, float) {
  return load(b);
}
PYPERC_INLINE Vector<float> operands_along(const BFloat16* b, Pair) {
  Vector<float> v;
  __builtin_memcpy(&v, b, sizeof(v));
  return v;
}

// As pack.inl's `pack`; operands of either kind are 32 bits and move as float32.
template <class S, class E>
void pack_half(Matrix<const S> b, int64_t k, int64_t n, int64_t panel, E* packed) {
  constexpr int W = WIDTH<float>;
  constexpr int64_t TERMS = Operands<E>::TERMS;
  const int64_t whole = k / TERMS, operands = (k + TERMS - 1) / TERMS;
  for (int64_t first = 0; first < n; first += panel, packed += operands * panel) {
    const int64_t columns = n - first < panel ? n - first : panel;
    const S* from = b.data + first * b.cs;
    const auto put = [&](int64_t p, int64_t j, Vector<float> v)
                         __attribute__((always_inline)) { __builtin_memcpy(packed + p * panel + j, &v, sizeof(v)); };
    const auto rest = [&](int64_t begin, int64_t j) {
      for (int64_t p = begin; p < operands; ++p) {
        packed[p * panel + j] = operand(from + p * TERMS * b.rs + j * b.cs, b.rs, k - p * TERMS, E{});
      }
    };
    int64_t j = 0;
    if (b.rs == 1 && b.cs != 1) {
      for (; j + W <= columns; j += W) {
        int64_t p = 0;
        for (; p + W <= whole; p += W) {
          Vector<float> rows[W];
          PYPERC_UNROLL
          for (int i = 0; i < W; ++i) rows[i] = operands_along(from + (j + i) * b.cs + p * TERMS, E{});
          transpose<float>(rows);
          PYPERC_UNROLL
          for (int i = 0; i < W; ++i) put(p + i, j, rows[i]);
        }
        for (int i = 0; i < W; ++i) rest(p, j + i);
      }
    } else if (b.cs == 1) {
      for (; j + W <= columns; j += W) {
        for (int64_t p = 0; p < operands; ++p) {
          put(p, j, operands_across(from + p * TERMS * b.rs + j, b.rs, k - p * TERMS, E{}));
        }
      }
    }
    for (; j < columns; ++j) rest(0, j);
  }
}

// The vector of operands that stands at b, and the one of its first n terms, filled with zero.
template <class S>
PYPERC_INLINE Vector<float> row_operands(const S* b, float) {
  return load(b);
}
template <class S>
PYPERC_INLINE Vector<float> row_operands(const S* b, int n, float) {
  return load_first(b, n);
}
PYPERC_INLINE Vector<Pair> row_operands(const BFloat16* b, Pair) { return load(reinterpret_cast<const Pair*>(b)); }
PYPERC_INLINE Vector<Pair> row_operands(const BFloat16* b, int n, Pair) {
  BFloat16 whole[2 * WIDTH<float>] = {};
  for (int i = 0; i < n; ++i) whole[i] = b[i];
  return load(reinterpret_cast<const Pair*>(whole));
}

// `dot_columns` for 16-bit rows of b, by as many columns as the caller's `finished` sees at once.
template <class S, class E, int ROWS>
void dot_half_columns(const Gemm<E>& g, const S* b, int64_t first_row, int64_t begin, int64_t end) {
  constexpr int W = WIDTH<float>, COLUMNS = ACCUMULATORS / ROWS >= 4 ? 4 : 2;
  constexpr int64_t TERMS = Operands<E>::TERMS, STEP = W * TERMS, AT_ONCE = 64;
  const int64_t whole = g.k / STEP * STEP;
  const int tail = static_cast<int>(g.k - whole), tail_operands = static_cast<int>((tail + TERMS - 1) / TERMS);
  const MapFunction<float> map = map_of(g);
  alignas(64) float sums[ROWS * AT_ONCE];
  const E* const a = g.a.data + first_row * g.a.rs;
  const float* const init = g.init ? g.init + first_row * g.ld_init : nullptr;
  for (int64_t first = begin; first < end; first += AT_ONCE) {
    const int64_t last = first + AT_ONCE < end ? first + AT_ONCE : end;
    for (int64_t j = first; j < last; j += COLUMNS) {
      const int columns = last - j < COLUMNS ? static_cast<int>(last - j) : COLUMNS;
      const S* w[COLUMNS];
      PYPERC_UNROLL
      for (int c = 0; c < COLUMNS; ++c) w[c] = b + (j + (c < columns ? c : 0)) * g.ldb;
      Vector<float> acc[ROWS][COLUMNS];
      PYPERC_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        PYPERC_UNROLL
        for (int c = 0; c < COLUMNS; ++c) acc[i][c] = Vector<float>{};
      }
      const auto step = [&](int64_t p, auto read_a, auto read_b) __attribute__((always_inline)) {
        Vector<E> row[ROWS];
        PYPERC_UNROLL
        for (int i = 0; i < ROWS; ++i) row[i] = read_a(a + i * g.a.rs + p / TERMS);
        PYPERC_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
          const Vector<E> column = read_b(w[c] + p);
          PYPERC_UNROLL
          for (int i = 0; i < ROWS; ++i) acc[i][c] = multiply_add<E>(row[i], column, acc[i][c]);
        }
      };
      for (int64_t p = 0; p < whole; p += STEP) {
        step(
            p, [](const E* q) __attribute__((always_inline)) { return load(q); },
            [](const S* q) __attribute__((always_inline)) { return row_operands(q, E{}); });
      }
      if (tail) {
        step(
            whole, [&](const E* q) __attribute__((always_inline)) { return load_partial(q, tail_operands); },
            [&](const S* q) __attribute__((always_inline)) { return row_operands(q, tail, E{}); });
      }
      PYPERC_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        PYPERC_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
          const float s = sum<float>(acc[i][c]);
          if (c < columns) sums[i * AT_ONCE + j + c - first] = init ? init[i * g.ld_init + j + c] + s : s;
        }
      }
    }
    if (map) finish(g, map, static_cast<float*>(sums), AT_ONCE, first_row, first, ROWS, last - first);
    g.finished(g.context, sums, AT_ONCE, first_row, first, ROWS, last - first);
  }
}

template <class S, class E>
void dot_half(const Gemm<E>& g, const S* b) {
  dot_groups(g.m, g.n, g.k * static_cast<int64_t>(sizeof(S)), [&](auto rows, int64_t i, int64_t begin, int64_t end) {
    dot_half_columns<S, E, rows.value>(g, b, i, begin, end);
  });
}

template <class S, class E>
constexpr OperandKernels<S, E> make_products() {
  return {KC, gemm<E>, dot_half<S, E>, pack_half<S, E>};
}

template <class S>
constexpr HalfKernels<S> make_half_kernels() {
  HalfKernels<S> k{tile_of(WIDTH<float>), {}, {}, ACTIVATE<float>, DIFFERENTIATE<float>, widen<S>, narrow<S>};
  if constexpr (HAS_PAIRS<S>) {
    k.paired = make_products<S, Pair>();
  } else {
    k.widened = make_products<S, float>();
  }
  return k;
}
