// c = init + a b^T for few rows, b's rows in place: no packing. Included inside the anonymous namespace of an ISA file,
// after gemm.inl.

// Short and wide: each sum runs along k in lanes of its own, so b's transpose is read in place, without packing. Rows
// [first, first + ROWS) and columns [begin, end) of c.
template <class T, int ROWS>
void dot_columns(const Gemm<T>& g, int64_t first, int64_t begin, int64_t end) {
  constexpr int W = WIDTH<T>;
  constexpr int MOST = ACCUMULATORS / ROWS;
  constexpr int COLUMNS = MOST >= 8 ? 8 : MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1;
  const int64_t whole = g.k / W * W;
  const int tail = static_cast<int>(g.k - whole);
  const T* const a = g.a.data + first * g.a.rs;
  T* const out = g.c + first * g.ldc;
  const T* const init = g.init ? g.init + first * g.ld_init : nullptr;
  for (int64_t j = begin; j < end; j += COLUMNS) {
    const int columns = end - j < COLUMNS ? static_cast<int>(end - j) : COLUMNS;
    const T* b[COLUMNS];
    PYPERC_UNROLL
    for (int c = 0; c < COLUMNS; ++c) b[c] = g.b + (j + (c < columns ? c : 0)) * g.ldb;
    Vector<T> acc[ROWS][COLUMNS];
    PYPERC_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      PYPERC_UNROLL
      for (int c = 0; c < COLUMNS; ++c) acc[i][c] = Vector<T>{};
    }
    const auto step = [&](int64_t p, auto read) __attribute__((always_inline)) {
      Vector<T> row[ROWS];
      PYPERC_UNROLL
      for (int i = 0; i < ROWS; ++i) row[i] = read(a + i * g.a.rs + p);
      PYPERC_UNROLL
      for (int c = 0; c < COLUMNS; ++c) {
        const Vector<T> w = read(b[c] + p);
        PYPERC_UNROLL
        for (int i = 0; i < ROWS; ++i) acc[i][c] = fma(row[i], w, acc[i][c]);
      }
    };
    for (int64_t p = 0; p < whole; p += W) step(p, [](const T* q) __attribute__((always_inline)) { return load(q); });
    if (tail) step(whole, [&](const T* q) __attribute__((always_inline)) { return load_partial(q, tail); });
    PYPERC_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      PYPERC_UNROLL
      for (int c = 0; c < COLUMNS; ++c) {
        const T s = sum<T>(acc[i][c]);
        if (c < columns) out[i * g.ldc + j + c] = init ? init[i * g.ld_init + j + c] + s : s;
      }
    }
  }
}

// f(ROWS, i, begin, end) for the rows of c in groups from row i on, in turn over as many columns as keep their part of
// b, `bytes` each, in the second-level cache meanwhile.
template <class F>
void dot_groups(int64_t m, int64_t n, int64_t bytes, F f) {
  constexpr int MOST_ROWS = 4;
  constexpr int64_t NEAR = 256 * 1024, COLUMNS = 8;
  const Tiles groups(m, MOST_ROWS);
  const int64_t fitting = NEAR / (bytes + 1) / COLUMNS * COLUMNS;
  const int64_t at_once = groups.count == 1 ? n : fitting > COLUMNS ? fitting : COLUMNS;
  for (int64_t j = 0; j < n; j += at_once) {
    const int64_t end = j + at_once < n ? j + at_once : n;
    for (int64_t t = 0; t < groups.count; ++t) {
      switch (groups.rows(t)) {
        case 1: f(Constant<1>{}, groups.begin(t), j, end); break;
        case 2: f(Constant<2>{}, groups.begin(t), j, end); break;
        case 3: f(Constant<3>{}, groups.begin(t), j, end); break;
        case 4: f(Constant<4>{}, groups.begin(t), j, end); break;
      }
    }
  }
}

template <class T>
void dot(const Gemm<T>& g) {
  dot_groups(g.m, g.n, g.k * static_cast<int64_t>(sizeof(T)),
             [&](auto rows, int64_t i, int64_t begin, int64_t end) { dot_columns<T, rows.value>(g, i, begin, end); });
  if (const MapFunction<T> map = map_of(g)) finish(g, map, g.c, g.ldc, 0, 0, g.m, g.n);
}
