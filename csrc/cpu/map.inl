// The elementwise passes: x = f(s), and ds = dx * f'(saved) with db in the same sweep. Included inside the anonymous
// namespace of an ISA file. They run on tiles that are in the first-level cache, and on whole blocks.

// Whether rows shorter than a vector adjoin, so that together they fill whole vectors.
template <class T>
PYPERC_INLINE bool adjoin(const Map<T>& g) {
  return g.rows > 1 && g.columns < WIDTH<T> && g.ld_in == g.columns && g.ld_out == g.columns;
}
template <class T>
PYPERC_INLINE Map<T> as_one_row(Map<T> g) {
  g.columns *= g.rows;
  g.rows = 1;
  return g;
}

template <class T, class A>
void activate(const Map<T>& g) {
  constexpr int W = WIDTH<T>;
  const Parameters parameters = g.parameters;
  if (adjoin(g)) return activate<T, A>(as_one_row(g));
  const int64_t columns = g.columns;
  const auto f = [&](Vector<T> s) __attribute__((always_inline)) { return A::f(Value<T>(s), parameters).v; };
  for (int64_t i = 0; i < g.rows; ++i) {
    const T* in = g.in + i * g.ld_in;
    T* out = g.out + i * g.ld_out;
    int64_t j = 0;
    for (; j + 2 * W <= columns; j += 2 * W) {
      const Vector<T> x = f(load(in + j)), y = f(load(in + j + W));
      store(out + j, x);
      store(out + j + W, y);
    }
    if (j + W <= columns) {
      store(out + j, f(load(in + j)));
      j += W;
    }
    if (const int tail = static_cast<int>(columns - j)) store_partial(out + j, f(load_partial(in + j, tail)), tail);
  }
}

// One vector of columns of a few rows, whose ds go into db four at a time, so that few additions wait for the one
// before.
template <class T, class A, bool PARTIAL>
PYPERC_INLINE void differentiate_columns(const Map<T>& g, int64_t begin, int64_t end, int64_t j, int columns) {
  const Parameters parameters = g.parameters;
  const auto read = [&](const T* p) __attribute__((always_inline)) {
    if constexpr (PARTIAL) {
      return load_partial(p, columns);
    } else {
      return load(p);
    }
  };
  const auto write = [&](T* p, Vector<T> x) __attribute__((always_inline)) {
    if constexpr (PARTIAL) {
      store_partial(p, x, columns);
    } else {
      store(p, x);
    }
  };
  const auto row = [&](int64_t i) __attribute__((always_inline)) {
    const Vector<T> dx = read(g.in + i * g.ld_in + j), saved = read(g.saved + i * g.ld_saved + j);
    const Vector<T> ds = A::backward(Value<T>(dx), Value<T>(saved), parameters).v;
    write(g.out + i * g.ld_out + j, ds);
    return ds;
  };
  Vector<T> sum{};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    const Vector<T> first = row(i) + row(i + 1);
    sum += first + (row(i + 2) + row(i + 3));
  }
  for (; i < end; ++i) sum += row(i);
  if (g.db) write(g.db + j, read(g.db + j) + sum);
}

// The same of many columns, row after row as they lie in memory, which is asked for some rows ahead: dy comes from
// there, and so may what f' reads. db is summed in the same order. Returns how many columns were whole vectors in
// pairs. Zen 3, 65536 x 64 relu: 0.4 of the time that columns one after the other take, 2048 x 2048 0.6.
template <class T, class A>
PYPERC_INLINE int64_t differentiate_along(const Map<T>& g, int64_t begin, int64_t end) {
  constexpr int W = WIDTH<T>, STEP = 2 * W;
  constexpr int64_t AHEAD = 4, MOST = 512, LINE = 64 / sizeof(T);
  const Parameters parameters = g.parameters;
  const int64_t columns = g.columns / STEP * STEP;
  T pairs[MOST], sums[MOST];
  for (int64_t first = 0; first < columns; first += MOST) {
    const int64_t n = columns - first < MOST ? columns - first : MOST;
    for (int64_t j = 0; j < n; ++j) sums[j] = T(0);
    const auto at = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
      const Vector<T> dx = load(g.in + i * g.ld_in + j), saved = load(g.saved + i * g.ld_saved + j);
      const Vector<T> ds = A::backward(Value<T>(dx), Value<T>(saved), parameters).v;
      store(g.out + i * g.ld_out + j, ds);
      return ds;
    };
    const auto fetch = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
      __builtin_prefetch(g.in + i * g.ld_in + j);
      if constexpr (A::saved != Saved::Nothing) __builtin_prefetch(g.saved + i * g.ld_saved + j);
    };
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) {
      const int64_t of_four = (i - begin) % 4;
      if (of_four == 0 && i + 4 > end) break;
      for (int64_t j = 0; j < n; j += STEP) {
        for (int64_t line = 0; line < STEP; line += LINE) {
          fetch(i + AHEAD, first + j + line);
          fetch(i + AHEAD + 1, first + j + line);
        }
        const Vector<T> left = at(i, first + j) + at(i + 1, first + j);
        const Vector<T> right = at(i, first + j + W) + at(i + 1, first + j + W);
        if (of_four == 0) {
          store(pairs + j, left);
          store(pairs + j + W, right);
        } else {
          store(sums + j, load(sums + j) + (load(pairs + j) + left));
          store(sums + j + W, load(sums + j + W) + (load(pairs + j + W) + right));
        }
      }
    }
    for (; i < end; ++i) {
      for (int64_t j = 0; j < n; j += W) store(sums + j, load(sums + j) + at(i, first + j));
    }
    if (!g.db) continue;
    T* const db = g.db + first;
    for (int64_t j = 0; j < n; j += W) store(db + j, load(db + j) + load(sums + j));
  }
  return columns;
}

// By blocks of rows, so that the error of db grows with the number of blocks, not of rows. A tile is one block at most.
template <class T, class A>
void differentiate_rows(const Map<T>& g) {
  constexpr int W = WIDTH<T>;
  constexpr int64_t BLOCK = 16;
  for (int64_t begin = 0; begin < g.rows; begin += BLOCK) {
    const int64_t end = begin + BLOCK < g.rows ? begin + BLOCK : g.rows;
    int64_t j = 0;
    if constexpr (BYTES > 0) {
      if (g.rows > BLOCK) j = differentiate_along<T, A>(g, begin, end);
    }
    for (; j + W <= g.columns; j += W) differentiate_columns<T, A, false>(g, begin, end, j, W);
    if (const int tail = static_cast<int>(g.columns - j)) differentiate_columns<T, A, true>(g, begin, end, j, tail);
  }
}
// db of rows shorter than a vector, by blocks of rows. Where they adjoin, as many vectors as a row has elements are
// whole rows; where not, each row is a partial vector. Either way the same numbers are added in the same order, so that
// strides change no bit.
constexpr int64_t FEW_ROWS = 16;
template <class T>
void add_short_rows(const T* ds, int64_t ld, int64_t rows, int columns, T* db) {
  constexpr int W = WIDTH<T>;
  for (int64_t begin = 0; begin < rows; begin += SHORT_ROWS, ds += SHORT_ROWS * ld) {
    const int64_t n = rows - begin < SHORT_ROWS ? rows - begin : SHORT_ROWS;
    if (n <= FEW_ROWS) {
      T nobody_reads[W];
      differentiate_rows<T, Identity>({n, columns, ds, ld, nobody_reads, 0, ds, ld, db, {}});
      continue;
    }
    const int64_t whole = n / W * W;
    Vector<T> sums[W] = {};
    T lanes[W * W];
    if (ld == columns) {
      for (int64_t i = 0; i < whole; i += W) {
        for (int v = 0; v < columns; ++v) sums[v] += load(ds + i * columns + v * W);
      }
      for (int v = 0; v < columns; ++v) store(lanes + v * W, sums[v]);
    } else {
      for (int64_t i = 0; i < whole; i += W) {
        for (int r = 0; r < W; ++r) sums[r] += load_partial(ds + (i + r) * ld, columns);
      }
      for (int r = 0; r < W; ++r) store_partial(lanes + r * columns, sums[r], columns);
    }
    // `lanes` are W rows now: what is left is added to them, and then one half to the other.
    for (int64_t i = whole; i < n; ++i) {
      for (int j = 0; j < columns; ++j) lanes[(i - whole) * columns + j] += ds[i * ld + j];
    }
    for (int half = W / 2; half > 0; half /= 2) {
      for (int j = 0; j < half * columns; ++j) lanes[j] += lanes[half * columns + j];
    }
    for (int j = 0; j < columns; ++j) db[j] += lanes[j];
  }
}

template <class A>
constexpr bool IS_IDENTITY = false;
template <>
constexpr bool IS_IDENTITY<Identity> = true;

template <class T, class A>
void differentiate(const Map<T>& g) {
  const bool one_row = adjoin(g) && g.ld_saved == g.columns;
  if (!one_row && (g.columns >= WIDTH<T> || g.rows <= FEW_ROWS || !g.db)) return differentiate_rows<T, A>(g);
  const int columns = static_cast<int>(g.columns);
  if constexpr (IS_IDENTITY<A>) {
    if (g.ld_out == 0) return add_short_rows(g.in, g.ld_in, g.rows, columns, g.db);
  }
  Map<T> ds = one_row ? as_one_row(g) : g;
  ds.db = nullptr;
  differentiate_rows<T, A>(ds);
  if (g.db) add_short_rows(static_cast<const T*>(g.out), g.ld_out, g.rows, columns, g.db);
}

template <class T>
constexpr MapFunction<T> ACTIVATE[] = {
#define X(A) activate<T, pyperc::A>,
    PYPERC_ACTIVATIONS(X)
#undef X
};
template <class T>
constexpr MapFunction<T> DIFFERENTIATE[] = {
#define X(A) differentiate<T, pyperc::A>,
    PYPERC_ACTIVATIONS(X)
#undef X
};

template <class E, class T = Sum<E>>
MapFunction<T> map_of(const Gemm<E>& g) {
  switch (g.after) {
    case After::Activate:
      if (g.activation == Activation::Identity && g.x == g.c) return nullptr;
      return ACTIVATE<T>[static_cast<int>(g.activation)];
    case After::Differentiate: return DIFFERENTIATE<T>[static_cast<int>(g.activation)];
    case After::Nothing: break;
  }
  return nullptr;
}
