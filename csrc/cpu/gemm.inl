// c = init + a b with its epilogue: the microkernel and the loops around it. Included inside the anonymous namespace of
// an ISA file, which defines beside BYTES the tile, MR and ACCUMULATORS; A_BLOCK, below; UNROLL, the steps of k in an
// iteration; and FETCHES, whether each step fetches some of the next panel.
//
//                 n                        A tile of c stays in registers while p runs over k: each step loads one row
//           +-----------+                  of the b panel (VECTORS vectors) and broadcasts one column of a (ROWS
//         k |  panel of |                  elements). b is read in place, or from panels packed as below; a is read in
//           |  b        |                  place along its unit stride.
//     k     +-----------+
//   +-----+ +-----------+                  packed b, panel = 2 vectors of 4:  b00 b01 ... b07  b10 b11 ... b17  ...
// m |  a  | | tile of c |                                                     |  p = 0       | |  p = 1      |
//   +-----+ +-----------+

// Cache blocks. A panel of KC x NR (128 KB in float32 at AVX-512) streams from the second-level cache, where the block
// of MC x KC of a stays beside it: A_BLOCK bytes, by the ISA's processors. Measured on Zen 5 at 1024 and 2048 cubed:
// 512 runs 5 to 10% faster than 256 or 384, 1024 another 7 to 9%.
constexpr int64_t KC = 1024;
template <class E>
constexpr int64_t MC = A_BLOCK / (KC * static_cast<int64_t>(sizeof(E))) / MR * MR;

enum class Unit { Row, Column };  // which stride of a is 1: along a row (cs), or along a column (rs)

// E: the operands of a product; T: its sums, in vectors of as many lanes as those of E.
template <class E, class T = Sum<E>>
struct Micro {
  int64_t k;
  const E* a;
  int64_t stride;  // of a: the one that is not 1
  const E* b;
  int64_t ldb;
  T* c;
  int64_t ldc;
  const T* init;
  int64_t ld_init;
  int columns;    // of the last vector, where it is partial
  const E* next;  // fetched into the second-level cache meanwhile, `next_step` elements further with each step
  int64_t next_step;
};
template <class E>
using Microkernel = void (*)(const Micro<E>&, const Parameters&);

PYPERC_INLINE Vector<float> broadcast(float x) { return splat<Vector<float>>(x); }
PYPERC_INLINE Vector<double> broadcast(double x) { return splat<Vector<double>>(x); }

template <class E>
PYPERC_INLINE Vector<Sum<E>> multiply_add(Vector<E> a, Vector<E> b, Vector<Sum<E>> c) {
  if constexpr (Operands<E>::TERMS == 2) {
    return dot_pairs(a, b, c);
  } else {
    return fma(a, b, c);
  }
}

template <class T, bool PARTIAL>
PYPERC_INLINE Vector<T> load_columns(const T* p, int columns) {
  if constexpr (PARTIAL) {
    return load_partial(p, columns);
  } else {
    return load(p);
  }
}

template <class E, int ROWS, int VECTORS, bool PARTIAL, Unit UNIT, class A>
void microkernel(const Micro<E>& g, const Parameters& parameters) {
  using T = Sum<E>;
  constexpr int W = WIDTH<T>;
  Vector<T> acc[ROWS][VECTORS];
  const E *b = g.b, *next = g.next;
  const int64_t ldb = g.ldb, k = g.k, next_step = g.next_step;
  PYPERC_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    PYPERC_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      acc[i][j] = Vector<T>{};
    }
  }
  // The lines of c that the end of the sum touches are fetched meanwhile.
  PYPERC_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    PYPERC_UNROLL
    for (int j = 0; j < VECTORS; ++j) __builtin_prefetch(g.c + i * g.ldc + j * W, 1);
  }
  const auto step = [&](auto a_at) __attribute__((always_inline)) {
    Vector<E> row[VECTORS];
    PYPERC_UNROLL
    for (int j = 0; j < VECTORS; ++j) row[j] = load_columns<E, PARTIAL>(b + j * W, g.columns);
    PYPERC_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const Vector<E> a = broadcast(a_at(i));
      PYPERC_UNROLL
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = multiply_add<E>(a, row[j], acc[i][j]);
    }
    b += ldb;
    if constexpr (FETCHES) {
      __builtin_prefetch(next, 0, 2);
      next += next_step;
    }
  };
  if constexpr (UNIT == Unit::Column) {
    const E* a = g.a;
    PYPERC_UNROLL_BY(UNROLL)
    for (int64_t p = 0; p < k; ++p, a += g.stride) {
      step([&](int i) __attribute__((always_inline)) { return a[i]; });
    }
  } else {
    // One pointer for three rows: x86 addresses base, base + stride and base + 2 stride without further registers.
    // The barrier keeps the compiler from turning them into one pointer a row, which would spill.
    constexpr int GROUPS = (ROWS + 2) / 3;
    const E* a[GROUPS];
    PYPERC_UNROLL
    for (int i = 0; i < GROUPS; ++i) a[i] = g.a + 3 * i * g.stride;
    const int64_t stride = g.stride;
    PYPERC_UNROLL_BY(UNROLL)
    for (int64_t p = 0; p < k; ++p) {
      step([&](int i) __attribute__((always_inline)) { return a[i / 3][(i % 3) * stride]; });
      PYPERC_UNROLL
      for (int i = 0; i < GROUPS; ++i) {
        ++a[i];
        asm("" : "+r"(a[i]));
      }
    }
  }
  if (g.init) {
    PYPERC_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      PYPERC_UNROLL
      for (int j = 0; j < VECTORS; ++j) {
        acc[i][j] += load_columns<T, PARTIAL>(g.init + i * g.ld_init + j * W, g.columns);
      }
    }
  }
  PYPERC_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    PYPERC_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      const Vector<T> x = A::f(Value<T>(acc[i][j]), parameters).v;
      T* c = g.c + i * g.ldc + j * W;
      if constexpr (PARTIAL) {
        store_partial(c, x, g.columns);
      } else {
        store(c, x);
      }
    }
  }
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

constexpr Tile tile_of(int width) { return {MR, ACCUMULATORS, width}; }
static_assert(ACCUMULATORS * WIDTH<float> <= Tile::MOST_ELEMENTS);

// The microkernels of one activation, by the unit stride of a, vectors (log2) and rows; partial ones have one vector.
template <class E>
struct MicrokernelTable {
  Microkernel<E> full[2][4][MR + 1] = {};
  Microkernel<E> partial[2][MR + 1] = {};

  PYPERC_INLINE Microkernel<E> get(Unit unit, int vectors, int rows) const {
    return full[static_cast<int>(unit)][__builtin_ctz(vectors)][rows];
  }
};

template <class E, class A, Unit UNIT, int... I>
constexpr void fill(MicrokernelTable<E>& table, Indices<I...>) {
  constexpr Tile tile = tile_of(WIDTH<Sum<E>>);
  constexpr int U = static_cast<int>(UNIT);
  const auto one = [&](auto row) {
    constexpr int ROWS = decltype(row)::value;
    table.full[U][0][ROWS] = microkernel<E, ROWS, 1, false, UNIT, A>;
    if constexpr (ROWS <= tile.rows(2)) table.full[U][1][ROWS] = microkernel<E, ROWS, 2, false, UNIT, A>;
    if constexpr (ROWS <= tile.rows(4)) table.full[U][2][ROWS] = microkernel<E, ROWS, 4, false, UNIT, A>;
    if constexpr (ROWS <= tile.rows(8)) table.full[U][3][ROWS] = microkernel<E, ROWS, 8, false, UNIT, A>;
    if constexpr (BYTES > 0) table.partial[U][ROWS] = microkernel<E, ROWS, 1, true, UNIT, A>;
  };
  (one(Constant<I + 1>{}), ...);
}
template <class E, class A>
constexpr MicrokernelTable<E> make_table() {
  MicrokernelTable<E> table;
  fill<E, A, Unit::Row>(table, typename MakeIndices<MR>::type{});
  fill<E, A, Unit::Column>(table, typename MakeIndices<MR>::type{});
  return table;
}
template <class E, class A>
struct MicrokernelsOf {
  static constexpr MicrokernelTable<E> table = make_table<E, A>();
};

// The table whose epilogue is f, or null where f is applied to the finished tile.
template <class E>
const MicrokernelTable<E>* microkernels(Activation activation) {
  switch (activation) {
#define X(A)                                                                                       \
  case Activation::A:                                                                              \
    if constexpr (A::epilogue == Epilogue::Registers) return &MicrokernelsOf<E, pyperc::A>::table; \
    return nullptr;
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  return nullptr;
}

// What is done to a finished tile of c: nothing where the microkernel's epilogue has done it.
template <class E, class T = Sum<E>>
void finish(const Gemm<E>& g, MapFunction<T> map, T* c, int64_t ldc, int64_t i, int64_t j, int64_t rows,
            int64_t columns) {
  Map<T> tile{rows, columns, c, ldc, c, ldc, c, ldc, nullptr, g.parameters};
  if (g.x && g.x != g.c) {
    tile.out = g.x + i * g.ldx + j;
    tile.ld_out = g.ldx;
  }
  if (g.after == After::Differentiate) {
    if (g.saved) {
      tile.saved = g.saved + i * g.ld_saved + j;
      tile.ld_saved = g.ld_saved;
    }
    tile.db = g.db ? g.db + j : nullptr;
  }
  map(tile);
}

// Rows are shared out evenly among tiles: two tiles of 8 rows take less time than one of 14 and one of 2.
struct Tiles {
  int64_t m, count;
  Tiles(int64_t rows, int tallest) : m(rows), count((rows + tallest - 1) / tallest) {}
  int64_t begin(int64_t t) const { return m * t / count; }
  int rows(int64_t t) const { return static_cast<int>(begin(t + 1) - begin(t)); }
};

// A block of rows [i, i + m) of c and of k: where it begins in a and init, and how a is read; what becomes of its
// tiles. `micro` is the next tile's, written in place: a copy of it for each strip, read in other pieces than it has
// just been written in, waits for those writes, which took half of the time where k is 1.
template <class E>
struct Block {
  int64_t i, m;
  const E *a, *packed_a;  // packed_a null: in place
  const Sum<E>* init;
  Micro<E> micro;
  MapFunction<Sum<E>> map;
  decltype(Gemm<E>::finished) finished;
};

// Columns [j, j + columns) of a block of c, at most a panel, which begins at micro.b.
template <class E>
void strip(const Gemm<E>& g, const MicrokernelTable<E>& table, Block<E>& block, int vectors, int64_t j,
           int64_t columns) {
  using T = Sum<E>;
  constexpr Tile tile = tile_of(WIDTH<T>);
  alignas(64) T scratch[ACCUMULATORS * WIDTH<T>];
  const Unit unit = g.a.cs == 1 ? Unit::Row : Unit::Column;
  Micro<E>& micro = block.micro;
  for (int64_t taken; columns > 0; j += taken, columns -= taken, micro.b += taken) {
    // Full vectors in the widest tile that fits, then the partial one.
    while (vectors > 1 && vectors * tile.width > columns) vectors /= 2;
    const bool partial = columns < vectors * tile.width;
    taken = partial ? columns : vectors * tile.width;
    micro.columns = static_cast<int>(taken);
    if (!g.c) micro.ldc = vectors * tile.width;
    const Tiles tiles(block.m, tile.rows(vectors));
    // Each tile fetches its share of the next panel: 2048 cubed runs 5 to 8% faster.
    micro.next_step = g.panel / tiles.count;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t i = tiles.begin(t);
      const int rows = tiles.rows(t);
      micro.a = block.packed_a ? block.packed_a + i * micro.k : block.a + i * g.a.rs;
      if (block.packed_a) micro.stride = rows;
      micro.next = g.panel ? micro.b + g.ldb + t * micro.next_step * micro.k : micro.b;
      micro.c = g.c ? g.c + (block.i + i) * g.ldc + j : scratch;
      micro.init = block.init ? block.init + i * micro.ld_init + j : nullptr;
      (partial ? table.partial[static_cast<int>(unit)][rows] : table.get(unit, vectors, rows))(micro, g.parameters);
      if (block.map) finish(g, block.map, micro.c, micro.ldc, block.i + i, j, rows, taken);
      if (block.finished) block.finished(g.context, micro.c, micro.ldc, block.i + i, j, rows, taken);
    }
  }
}

// Some columns of a tile of a: moves of a constant size, where a tile's height is seldom that of a vector.
template <class E, int ROWS>
void pack_tile(const E* from, int64_t cs, int64_t columns, E* to) {
  constexpr int64_t AHEAD = 16;
  for (int64_t p = 0; p < columns; ++p, from += cs, to += ROWS) {
    __builtin_prefetch(from + AHEAD * cs, 0, 2);
    __builtin_memcpy(to, from, ROWS * sizeof(E));
  }
}
template <class E>
struct PackTable {
  void (*of[MR + 1])(const E*, int64_t, int64_t, E*) = {};
};
template <class E, int... I>
constexpr PackTable<E> make_pack_table(Indices<I...>) {
  PackTable<E> table;
  ((table.of[I + 1] = pack_tile<E, I + 1>), ...);
  return table;
}

// A block of a whose columns are contiguous, tile by tile, so that the microkernel reads one stream:
// tile 0: a(0..13, 0), a(0..13, 1), ...; tile 1: ...
// Some columns at a time, as many as stay in the first-level cache where they lie a power of two apart, so that the
// tiles share each line, and the lines of later ones fetched meanwhile.
template <class E>
void pack_a(const E* a, int64_t cs, int64_t m, int64_t k, E* packed) {
  static constexpr PackTable<E> table = make_pack_table<E>(typename MakeIndices<MR>::type{});
  constexpr int64_t AT_ONCE = 8;
  const Tiles tiles(m, MR);
  for (int64_t p = 0; p < k; p += AT_ONCE) {
    const int64_t columns = k - p < AT_ONCE ? k - p : AT_ONCE;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int rows = tiles.rows(t);
      table.of[rows](a + p * cs + tiles.begin(t), cs, columns, packed + tiles.begin(t) * k + p * rows);
    }
  }
}

// Row i of c, from K rows of b in place.
template <class T, int K, bool INIT>
PYPERC_INLINE void write_row(const Gemm<T>& g, int64_t i) {
  constexpr int W = WIDTH<T>;
  const T *const a = g.a.data + i * g.a.rs, *const b = g.b, *const init = INIT ? g.init + i * g.ld_init : nullptr;
  T* const c = g.c + i * g.ldc;
  const int64_t ldb = g.ldb, columns = g.n;
  Vector<T> factors[K];
  PYPERC_UNROLL
  for (int p = 0; p < K; ++p) factors[p] = broadcast(a[p * g.a.cs]);
  const auto sums = [&](int64_t j, auto read) __attribute__((always_inline)) {
    Vector<T> sum{};
    PYPERC_UNROLL
    for (int p = 0; p < K; ++p) sum = fma(factors[p], read(b + p * ldb + j), sum);
    return INIT ? sum + read(init + j) : sum;
  };
  int64_t j = 0;
  PYPERC_UNROLL_BY(4)
  for (; j + W <= columns; j += W) {
    store(c + j, sums(j, [](const T* q) __attribute__((always_inline)) { return load(q); }));
  }
  if (const int tail = static_cast<int>(columns - j)) {
    const auto read = [&](const T* q) __attribute__((always_inline)) { return load_partial(q, tail); };
    store_partial(c + j, sums(j, read), tail);
  }
}

// A product that does next to nothing but write c, from K rows of b in place: row by row, which takes a tile's sums in
// a tile's order, so that strides change no bit. What follows sees a few rows at once, so that db is rounded once for
// them.
template <class T, int K, bool INIT>
void write_rows(const Gemm<T>& g) {
  constexpr int64_t NEAR = 16 * 1024, LEAST = 4, MOST = 16;
  const int64_t fitting = NEAR / (g.n * static_cast<int64_t>(sizeof(T)));
  const int64_t at_once = fitting < LEAST ? LEAST : fitting < MOST ? fitting : MOST;
  const MapFunction<T> map = map_of(g);
  for (int64_t first = 0, rows; first < g.m; first += rows) {
    rows = g.m - first < at_once ? g.m - first : at_once;
    T* const c = g.c + first * g.ldc;
    for (int64_t i = 0; i < rows; ++i) write_row<T, K, INIT>(g, first + i);
    if (map) finish(g, map, c, g.ldc, first, 0, rows, g.n);
    if (g.finished) g.finished(g.context, c, g.ldc, first, 0, rows, g.n);
  }
}

template <class E>
void gemm(const Gemm<E>& g) {
  using T = Sum<E>;
  constexpr Tile tile = tile_of(WIDTH<T>);
  constexpr int64_t FEW = 4, STREAMS = 16, NARROW = 4;
  const bool wide = g.n > Tile::WIDEST * tile.width && g.c;
  if constexpr (Operands<E>::TERMS == 1) {
    if (g.n >= NARROW * tile.width && g.c && !g.panel) {
      switch (g.k) {
        case 1: return g.init ? write_rows<E, 1, true>(g) : write_rows<E, 1, false>(g);
        case 2: return g.init ? write_rows<E, 2, true>(g) : write_rows<E, 2, false>(g);
        case 3: return g.init ? write_rows<E, 3, true>(g) : write_rows<E, 3, false>(g);
        case 4: return g.init ? write_rows<E, 4, true>(g) : write_rows<E, 4, false>(g);
      }
    }
  }
  // A product that does next to nothing but read b goes along the rows of that, as many at once as prefetchers follow;
  // packed or not, so that strides change no bit.
  const bool reads = wide && g.m <= FEW;
  const int vectors = g.panel ? static_cast<int>(g.panel / tile.width) : tile.vectors(g.m);
  const int64_t width = vectors * tile.width, row_block = MC<E>, k_block = reads ? STREAMS : KC;
  const MicrokernelTable<E>* plain = &MicrokernelsOf<E, Identity>::table;
  const MicrokernelTable<E>* fused = g.after == After::Activate && g.x == g.c ? microkernels<E>(g.activation) : nullptr;
  const int64_t row_blocks = (g.m + row_block - 1) / row_block;
  const int64_t k_blocks = g.k > k_block ? (g.k + k_block - 1) / k_block : 1;
  Block<E> block{};
  for (int64_t r = 0; r < row_blocks; ++r) {
    block.i = g.m * r / row_blocks;
    block.m = g.m * (r + 1) / row_blocks - block.i;
    for (int64_t q = 0; q < k_blocks; ++q) {
      const int64_t p = g.k * q / k_blocks;
      const bool last = q == k_blocks - 1;
      Micro<E>& micro = block.micro;
      micro.k = g.k * (q + 1) / k_blocks - p;
      block.a = g.a.data + block.i * g.a.rs + p * g.a.cs;
      micro.stride = g.a.cs == 1 ? g.a.rs : g.a.cs;
      micro.ldb = g.panel ? g.panel : g.ldb;
      micro.ldc = g.ldc;
      block.init = q ? g.c + block.i * g.ldc : g.init ? g.init + block.i * g.ld_init : nullptr;
      micro.ld_init = q ? g.ldc : g.ld_init;
      // Packed by tiles of MR rows, so only for the widths that use those.
      if (g.a_block && g.a.cs != 1 && tile.rows(vectors) == MR) {
        pack_a(block.a, g.a.cs, block.m, micro.k, g.a_block);
        block.packed_a = g.a_block;
      }
      block.map = last && !fused ? map_of(g) : nullptr;
      block.finished = last ? g.finished : nullptr;
      for (int64_t j = 0; j < g.n; j += width) {
        micro.b = g.panel ? g.b + j / g.panel * g.ldb + p * g.panel : g.b + p * g.ldb + j;
        strip(g, last && fused ? *fused : *plain, block, vectors, j, g.n - j < width ? g.n - j : width);
      }
    }
  }
}
