// c = init + a b with its epilogue: the microkernel and the loops around it. Included inside the anonymous namespace of
// an ISA file, which defines MR and ACCUMULATORS beside BYTES.
//
//                 n                        A tile of c stays in registers while p runs over k: each step loads one row
//           +-----------+                  of the b panel (VECTORS vectors) and broadcasts one column of a (ROWS
//         k |  panel of |                  elements). b is read in place, or from panels packed as below; a is read in
//           |  b        |                  place along its unit stride.
//     k     +-----------+
//   +-----+ +-----------+                  packed b, panel = 2 vectors of 4:  b00 b01 ... b07  b10 b11 ... b17  ...
// m |  a  | | tile of c |                                                     |  p = 0       | |  p = 1      |
//   +-----+ +-----------+

// Depth of a cache block: a panel of KC x NR (48 KB in float32 at AVX-512) is reread from the first two cache levels
// for each tile of rows.
constexpr int64_t KC = 384;

enum class Unit { Row, Column };  // which stride of a is 1: along a row (cs), or along a column (rs)

template <class T>
struct Micro {
  int64_t k;
  const T* a;
  int64_t stride;  // of a: the one that is not 1
  const T* b;
  int64_t ldb;
  T* c;
  int64_t ldc;
  const T* init;
  int64_t ld_init;
  int columns;  // of the last vector, where it is partial
};
template <class T>
using Microkernel = void (*)(const Micro<T>&, const Parameters&);

template <class T, bool PARTIAL>
PYPERC_INLINE Vector<T> load_columns(const T* p, int columns) {
  if constexpr (PARTIAL) {
    return load_partial(p, columns);
  } else {
    return load(p);
  }
}

template <class T, int ROWS, int VECTORS, bool PARTIAL, Unit UNIT, class A>
void microkernel(const Micro<T>& g, const Parameters& parameters) {
  constexpr int W = WIDTH<T>;
  Vector<T> acc[ROWS][VECTORS];
  const T* b = g.b;
  const int64_t ldb = g.ldb, k = g.k;
  PYPERC_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    PYPERC_UNROLL
    for (int j = 0; j < VECTORS; ++j) {
      acc[i][j] = Vector<T>{};
    }
  }
  if (g.init) {
    PYPERC_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      PYPERC_UNROLL
      for (int j = 0; j < VECTORS; ++j) {
        acc[i][j] = load_columns<T, PARTIAL>(g.init + i * g.ld_init + j * W, g.columns);
      }
    }
  }
  const auto step = [&](auto a_at) __attribute__((always_inline)) {
    Vector<T> row[VECTORS];
    PYPERC_UNROLL
    for (int j = 0; j < VECTORS; ++j) row[j] = load_columns<T, PARTIAL>(b + j * W, g.columns);
    PYPERC_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const Vector<T> a = splat<Vector<T>>(a_at(i));
      PYPERC_UNROLL
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = fma(a, row[j], acc[i][j]);
    }
    b += ldb;
  };
  if constexpr (UNIT == Unit::Column) {
    const T* a = g.a;
    for (int64_t p = 0; p < k; ++p, a += g.stride) {
      step([&](int i) __attribute__((always_inline)) { return a[i]; });
    }
  } else {
    // One pointer for three rows: x86 addresses base, base + stride and base + 2 stride without further registers.
    // The barrier keeps the compiler from turning them into one pointer a row, which would spill.
    constexpr int GROUPS = (ROWS + 2) / 3;
    const T* a[GROUPS];
    PYPERC_UNROLL
    for (int i = 0; i < GROUPS; ++i) a[i] = g.a + 3 * i * g.stride;
    const int64_t stride = g.stride;
    for (int64_t p = 0; p < k; ++p) {
      step([&](int i) __attribute__((always_inline)) { return a[i / 3][(i % 3) * stride]; });
      PYPERC_UNROLL
      for (int i = 0; i < GROUPS; ++i) {
        ++a[i];
        asm("" : "+r"(a[i]));
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

// The microkernels of one activation, by the unit stride of a, vectors (log2) and rows; partial ones have one vector.
template <class T>
struct MicrokernelTable {
  Microkernel<T> full[2][4][MR + 1] = {};
  Microkernel<T> partial[2][MR + 1] = {};

  PYPERC_INLINE Microkernel<T> get(Unit unit, int vectors, int rows) const {
    return full[static_cast<int>(unit)][__builtin_ctz(vectors)][rows];
  }
};

template <class T, class A, Unit UNIT, int... I>
constexpr void fill(MicrokernelTable<T>& table, Indices<I...>) {
  constexpr Tile tile = tile_of(WIDTH<T>);
  constexpr int U = static_cast<int>(UNIT);
  const auto one = [&](auto row) {
    constexpr int ROWS = decltype(row)::value;
    table.full[U][0][ROWS] = microkernel<T, ROWS, 1, false, UNIT, A>;
    if constexpr (ROWS <= tile.rows(2)) table.full[U][1][ROWS] = microkernel<T, ROWS, 2, false, UNIT, A>;
    if constexpr (ROWS <= tile.rows(4)) table.full[U][2][ROWS] = microkernel<T, ROWS, 4, false, UNIT, A>;
    if constexpr (ROWS <= tile.rows(8)) table.full[U][3][ROWS] = microkernel<T, ROWS, 8, false, UNIT, A>;
    if constexpr (BYTES > 0) table.partial[U][ROWS] = microkernel<T, ROWS, 1, true, UNIT, A>;
  };
  (one(Constant<I + 1>{}), ...);
}
template <class T, class A>
constexpr MicrokernelTable<T> make_table() {
  MicrokernelTable<T> table;
  fill<T, A, Unit::Row>(table, typename MakeIndices<MR>::type{});
  fill<T, A, Unit::Column>(table, typename MakeIndices<MR>::type{});
  return table;
}
template <class T, class A>
struct MicrokernelsOf {
  static constexpr MicrokernelTable<T> table = make_table<T, A>();
};

// The table whose epilogue is f, or null where f is applied to the finished tile.
template <class T>
const MicrokernelTable<T>* microkernels(Activation activation) {
  switch (activation) {
#define X(A)                                                                                       \
  case Activation::A:                                                                              \
    if constexpr (A::epilogue == Epilogue::Registers) return &MicrokernelsOf<T, pyperc::A>::table; \
    return nullptr;
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  return nullptr;
}

// What is done to a finished tile of c: nothing where the microkernel's epilogue has done it.
template <class T>
void finish(const Gemm<T>& g, MapFunction<T> map, int64_t i, int64_t j, int64_t rows, int64_t columns) {
  T* c = g.c + i * g.ldc + j;
  Map<T> tile{rows, columns, c, g.ldc, c, g.ldc, c, g.ldc, nullptr, g.parameters};
  if (g.after == After::Activate) {
    tile.out = g.x + i * g.ldx + j;
    tile.ld_out = g.ldx;
  } else {
    if (g.saved) {
      tile.saved = g.saved + i * g.ld_saved + j;
      tile.ld_saved = g.ld_saved;
    }
    tile.db = g.db ? g.db + j : nullptr;
  }
  map(tile);
}

// Columns [j, j + columns) of c, at most a panel, for one block of k: `micro` holds the block of a, b and init.
template <class T>
void strip(const Gemm<T>& g, const MicrokernelTable<T>& table, MapFunction<T> map, Micro<T> micro, int vectors,
           int64_t j, int64_t columns) {
  constexpr Tile tile = tile_of(WIDTH<T>);
  const Unit unit = g.a.cs == 1 ? Unit::Row : Unit::Column;
  const T *a = micro.a, *init = micro.init;
  for (int64_t taken; columns > 0; j += taken, columns -= taken, micro.b += taken) {
    // Full vectors in the widest tile that fits, then the partial one.
    while (vectors > 1 && vectors * tile.width > columns) vectors /= 2;
    const bool partial = columns < vectors * tile.width;
    taken = partial ? columns : vectors * tile.width;
    micro.columns = static_cast<int>(taken);
    const int64_t tiles = (g.m + tile.rows(vectors) - 1) / tile.rows(vectors);
    for (int64_t t = 0; t < tiles; ++t) {
      // Rows are shared out evenly: two tiles of 8 rows take less time than one of 14 and one of 2.
      const int64_t i = g.m * t / tiles;
      const int rows = static_cast<int>(g.m * (t + 1) / tiles - i);
      micro.a = a + i * g.a.rs;
      micro.c = g.c + i * g.ldc + j;
      micro.init = init ? init + i * micro.ld_init + j : nullptr;
      (partial ? table.partial[static_cast<int>(unit)][rows] : table.get(unit, vectors, rows))(micro, g.parameters);
      if (map) finish(g, map, i, j, rows, taken);
    }
  }
}

template <class T>
void gemm(const Gemm<T>& g) {
  constexpr Tile tile = tile_of(WIDTH<T>);
  const int vectors = g.panel ? static_cast<int>(g.panel / tile.width) : tile.vectors(g.m);
  const int64_t width = vectors * tile.width;
  const MicrokernelTable<T>* plain = &MicrokernelsOf<T, Identity>::table;
  const MicrokernelTable<T>* fused = g.after == After::Activate && g.x == g.c ? microkernels<T>(g.activation) : nullptr;
  const int64_t blocks = g.k > KC ? (g.k + KC - 1) / KC : 1;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t p = g.k * block / blocks;
    const bool last = block == blocks - 1;
    Micro<T> micro{};
    micro.k = g.k * (block + 1) / blocks - p;
    micro.a = g.a.data + p * g.a.cs;
    micro.stride = g.a.cs == 1 ? g.a.rs : g.a.cs;
    micro.ldb = g.panel ? g.panel : g.ldb;
    micro.ldc = g.ldc;
    micro.init = block ? g.c : g.init;
    micro.ld_init = block ? g.ldc : g.ld_init;
    const MapFunction<T> map = last && !fused ? map_of(g) : nullptr;
    for (int64_t j = 0; j < g.n; j += width) {
      micro.b = g.panel ? g.b + j / g.panel * g.ldb + p * g.panel : g.b + p * g.ldb + j;
      strip(g, last && fused ? *fused : *plain, map, micro, vectors, j, g.n - j < width ? g.n - j : width);
    }
  }
}

// Short and wide: each sum runs along k in lanes of its own, so b's transpose is read in place, without packing.
template <class T, int ROWS>
void dot_columns(const Gemm<T>& g) {
  constexpr int W = WIDTH<T>;
  constexpr int MOST = ACCUMULATORS / ROWS;
  constexpr int COLUMNS = MOST >= 8 ? 8 : MOST >= 4 ? 4 : MOST >= 2 ? 2 : 1;
  const int64_t whole = g.k / W * W;
  const int tail = static_cast<int>(g.k - whole);
  for (int64_t j = 0; j < g.n; j += COLUMNS) {
    const int columns = g.n - j < COLUMNS ? static_cast<int>(g.n - j) : COLUMNS;
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
      for (int i = 0; i < ROWS; ++i) row[i] = read(g.a.data + i * g.a.rs + p);
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
        if (c < columns) g.c[i * g.ldc + j + c] = g.init ? g.init[i * g.ld_init + j + c] + s : s;
      }
    }
  }
}

constexpr int DOT_ROWS = 4;

template <class T>
void dot(const Gemm<T>& g) {
  switch (g.m) {
    case 1: dot_columns<T, 1>(g); break;
    case 2: dot_columns<T, 2>(g); break;
    case 3: dot_columns<T, 3>(g); break;
    case 4: dot_columns<T, 4>(g); break;
    default: return;
  }
  if (const MapFunction<T> map = map_of(g)) finish(g, map, 0, 0, g.m, g.n);
}

// W x W blocks of the transpose of b, through registers; out has rows of `panel` elements.
template <class T>
void pack_transposed(const T* b, int64_t cs, int64_t k, int64_t columns, int64_t panel, T* out) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    int64_t p = 0;
    for (; p + W <= k; p += W) {
      Vector<T> rows[W];
      PYPERC_UNROLL
      for (int i = 0; i < W; ++i) rows[i] = load(b + (j + i) * cs + p);
      transpose<T>(rows);
      PYPERC_UNROLL
      for (int i = 0; i < W; ++i) store(out + (p + i) * panel + j, rows[i]);
    }
    for (; p < k; ++p) {
      for (int i = 0; i < W; ++i) out[p * panel + j + i] = b[(j + i) * cs + p];
    }
  }
  for (; j < columns; ++j) {
    for (int64_t p = 0; p < k; ++p) out[p * panel + j] = b[j * cs + p];
  }
}

template <class T>
void pack(Matrix<const T> b, int64_t k, int64_t n, int64_t panel, T* packed) {
  for (int64_t j = 0; j < n; j += panel, packed += k * panel) {
    const int64_t columns = n - j < panel ? n - j : panel;
    const T* from = b.data + j * b.cs;
    if (b.rs == 1 && b.cs != 1) {
      pack_transposed(from, b.cs, k, columns, panel, packed);
    } else if (b.cs == 1 && columns == panel) {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t i = 0; i < columns; i += WIDTH<T>) store(packed + p * panel + i, load(from + p * b.rs + i));
      }
    } else {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t i = 0; i < columns; ++i) packed[p * panel + i] = from[p * b.rs + i * b.cs];
      }
    }
  }
}
