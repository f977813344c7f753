// How a network's numbers are stored, S, and multiplied, E, so that one forward and one backward pass serve every
// dtype. Sums T are Sum<E>.
//
//   float32, float64      S = E = T: rows are read where they lie, and a product writes its result where it belongs
//   bfloat16 in pairs     E = Pair: rows of whole pairs are read where they lie
//   16 bits, widened      E = float: rows are widened first
//
// Of the last two, each tile of a product gets its activation, or derivative, in float32 while it is in the first-level
// cache, and is rounded once, when it is stored:
//
//              gemm             f              narrow
//   operands  ------>  c, s   ------>  f32   ---------->  x in 16 bits  ->  operands of the next layer
//
// dw and db are summed over the whole batch before they are rounded.
#pragma once

#include <type_traits>

#include "mlp.h"
#include "pass.h"

namespace pyperc {

// Where a product's sums go while they are not finished: room for its rows and columns.
template <class E>
using Sums = Matrix<Sum<E>>;

template <class S, class E>
struct Numbers;

template <class T>
struct Numbers<T, T> {
  using Kernel = Kernels<T>;
  static constexpr bool DIRECT = true;
  static constexpr int64_t TERMS = 1;
  const Kernel& kernels;

  explicit Numbers(const Kernel& k) : kernels(k) {}
  const Tile& tile() const { return kernels.tile; }
  int64_t kc() const { return kernels.kc; }
  int64_t a_block() const { return kernels.a_block; }

  bool is_operand(Matrix<const T> x, int64_t) const { return x.cs == 1; }
  Matrix<const T> as_operand(Matrix<const T> x) const { return x; }
  void make_operands(Matrix<const T> x, int64_t rows, int64_t columns, T* to, int64_t ld) const {
    copy_rows(x, rows, columns, to, ld);
  }
  void pack(Matrix<const T> b, int64_t k, int64_t n, int64_t panel, T* packed) const {
    kernels.pack(b, k, n, panel, packed);
  }
  // The same of f(s), an input that was not kept.
  void pack_activated(const LayerSpec& spec, Matrix<const T> s, int64_t k, int64_t n, int64_t panel, T* packed) const {
    const auto activate = [&](int64_t rows, int64_t columns, const T* from, T* to, int64_t ld) {
      const Map<T> map{rows, columns, from, s.rs, to, ld, nullptr, 0, nullptr, spec.parameters};
      kernels.activate[static_cast<int>(spec.activation)](map);
    };
    if (is_narrow(n, s.rs)) {
      T room[Tile::MOST_ELEMENTS];
      const int64_t most = Tile::MOST_ELEMENTS / n;
      for (int64_t i = 0; i < k; i += most) {
        const int64_t rows = std::min(most, k - i);
        activate(rows, n, s.data + i * n, room, n);
        copy_rows<T>({room, n, 1}, rows, n, packed + i * panel, panel);
      }
      return;
    }
    for (int64_t j = 0; j < n; j += panel) activate(k, std::min(panel, n - j), s.data + j, packed + j * k, panel);
  }

  // s = g and x = f(s), from column `first` on; `next` has x where nobody keeps it. `w`: rows of the weight for `dot`.
  void activated(Gemm<T>& g, const T* w, const LayerSpec& spec, int64_t first, Matrix<T> s, Matrix<T> x, Matrix<T> next,
                 Sums<T>) const {
    const Matrix<T>& out = x.data ? x : next;
    const auto multiply_by_w = [&] {
      if (w) {
        g.b = w;
        kernels.dot(g);
      } else {
        multiply(g);
      }
    };
    if (is_narrow(g.n, out.rs) && (!s.data || is_narrow(g.n, s.rs))) {
      g.c = s.data ? s.data : out.data;
      g.ldc = g.n;
      multiply_by_w();
      kernels.activate[static_cast<int>(spec.activation)](
          {g.m, g.n, g.c, g.n, out.data, g.n, nullptr, 0, nullptr, spec.parameters});
      return;
    }
    g.after = After::Activate;
    g.activation = spec.activation;
    g.parameters = spec.parameters;
    g.x = out.data + first;
    g.ldx = out.rs;
    g.c = s.data ? s.data + first : g.x;
    g.ldc = s.data ? s.rs : g.ldx;
    multiply_by_w();
  }

  // One column fills no vector. Of a layer of one input and one output it is rows times a number; of a whose columns
  // are contiguous, as ds^T is in dw, it is the row b^T a^T, whose vectors lie along a; and of long rows, as ds has in
  // dx, a sum along each.
  void multiply(const Gemm<T>& g) const {
    if (g.n != 1 || g.after != After::Nothing || (g.k > 1 && g.ldc != 1)) return kernels.gemm(g);
    const int64_t ldb = g.panel ? g.panel : g.ldb;
    if (g.k == 1) {
      if (g.a.rs == 1 && g.ldc == 1 && (!g.init || g.ld_init == 0)) {
        const T w = g.b[0], b = g.init ? g.init[0] : T(0);
        for (int64_t i = 0; i < g.m; ++i) g.c[i] = g.a.data[i] * w + b;
        return;
      }
      for (int64_t i = 0; i < g.m; ++i) {
        g.c[i * g.ldc] = g.a.data[i * g.a.rs] * g.b[0] + (g.init ? g.init[i * g.ld_init] : T(0));
      }
      return;
    }
    const bool by_row = g.a.cs != 1;
    if (!by_row && g.k < thresholds().dot_terms) return kernels.gemm(g);
    const T* init = g.init;
    if (init && g.ld_init != 1) {  // as a row: a bias is one number for the whole column
      for (int64_t i = 0; i < g.m; ++i) g.c[i] = init[i * g.ld_init];
      init = g.c;
    }
    if (by_row) return kernels.gemm({1, g.m, g.k, {g.b, 1, ldb}, g.a.data, g.a.cs, 0, g.c, g.m, init, g.m});
    T room[Tile::MOST_ELEMENTS];
    for (int64_t p = 0; p < g.k; p += Tile::MOST_ELEMENTS) {
      const int64_t k = std::min<int64_t>(Tile::MOST_ELEMENTS, g.k - p);
      const T* b = g.b + p * ldb;
      if (ldb != 1) {
        copy_rows<T>({b, 0, ldb}, 1, k, room, k);
        b = room;
      }
      kernels.dot({1, g.m, k, {b, k, 1}, g.a.data + p, g.a.rs, 0, g.c, g.m, p ? g.c : init, g.m});
    }
  }

  // Whether columns are fewer than a vector has, in rows that adjoin: their activations take a sweep of their own, over
  // whole vectors, as the tile of a product would leave most of each vector empty.
  bool is_narrow(int64_t columns, int64_t rs) const { return 0 < columns && columns < tile().width && rs == columns; }

  // Whether `differentiated` needs sums: where ds takes the place of what f' is read from, they may not lie there.
  static bool is_same(Matrix<const T> saved, Matrix<const T> ds) { return ds.data && ds.data == saved.data; }
  bool needs_sums(int64_t k, int64_t columns, Matrix<const T> saved, Matrix<const T> ds) const {
    return is_same(saved, ds) && (k > kernels.kc || is_narrow(columns, ds.rs));
  }
  // ds = g * f'(saved) from column `first` on, and db.
  void differentiated(Gemm<T>& g, const LayerSpec& spec, int64_t first, Matrix<const T> saved, Matrix<T> ds, T* db,
                      Sums<T> sums) const {
    const bool same = is_same(saved, {ds.data, ds.rs, 1});
    if (is_narrow(g.n, ds.rs) && (!saved.data || is_narrow(g.n, saved.rs))) {
      g.c = same ? sums.data : ds.data;
      g.ldc = g.n;
      multiply(g);
      kernels.differentiate[static_cast<int>(spec.activation)](
          {g.m, g.n, g.c, g.n, ds.data, g.n, saved.data ? saved.data : g.c, g.n, db, spec.parameters});
      return;
    }
    g.after = After::Differentiate;
    g.activation = spec.activation;
    g.parameters = spec.parameters;
    g.saved = saved.data ? saved.data + first : nullptr;
    g.ld_saved = saved.rs;
    g.db = db ? db + first : nullptr;
    g.c = ds.data + first;
    g.ldc = ds.rs;
    if (same) {
      g.x = g.c;
      g.ldx = g.ldc;
      g.c = g.k > kernels.kc ? sums.data : nullptr;
      g.ldc = sums.rs;
    }
    kernels.gemm(g);
  }
  // One block of a sum over several, or all of it: out += g, or out = g for the first.
  void added(Gemm<T>& g, bool first, Matrix<T> out) const {
    g.c = out.data;
    g.ldc = out.rs;
    g.init = first ? nullptr : g.c;
    g.ld_init = g.ldc;
    multiply(g);
  }

  // The same for a sum that an optimiser takes from `sums`, or tile by tile where it needs no more than one block: from
  // row i and column j of the weight on.
  void descended(Gemm<T>& g, bool first, bool last, const Descent<T>& descent, int64_t i, int64_t j,
                 Sums<T> sums) const {
    const auto finished = [&](const T* c, int64_t ldc, int64_t row, int64_t column, int64_t rows, int64_t columns) {
      descent(i + row, j + column, rows, columns, c, ldc);
    };
    g.c = sums.data;
    g.ldc = sums.rs;
    g.init = first ? nullptr : g.c;
    g.ld_init = g.ldc;
    if (last) {
      g.context = const_cast<void*>(static_cast<const void*>(&finished));
      g.finished = [](void* context, T* c, int64_t ldc, int64_t i, int64_t j, int64_t rows, int64_t columns) {
        (*static_cast<decltype(finished)*>(context))(c, ldc, i, j, rows, columns);
      };
    }
    kernels.gemm(g);
  }

  // ds = dy * f'(saved) and db, for rows and columns; without ds, db alone.
  void differentiate(const LayerSpec& spec, Matrix<const T> dy, int64_t rows, int64_t columns, Matrix<const T> saved,
                     Matrix<T> ds, T* db) const {
    T room[Tile::MOST_ELEMENTS];
    if (dy.cs != 1) {
      // In pieces, since ds may lie where f' is still to be read from.
      const int64_t most = columns < tile().width ? SHORT_ROWS : 16, COLUMNS = Tile::MOST_ELEMENTS / most;
      for (int64_t i = 0; i < rows; i += most) {
        for (int64_t j = 0; j < columns; j += COLUMNS) {
          const int64_t m = std::min(most, rows - i), n = std::min(COLUMNS, columns - j);
          const auto at = [&](const auto& x) { return x.data ? x.data + i * x.rs + j : nullptr; };
          copy_rows<T>({dy.data + i * dy.rs + j * dy.cs, dy.rs, dy.cs}, m, n, room, COLUMNS);
          differentiate(spec, {room, COLUMNS, 1}, m, n, {at(saved), saved.rs, 1}, {at(ds), ds.rs, 1},
                        db ? db + j : nullptr);
        }
      }
      return;
    }
    if (!ds.data) ds.rs = 0;  // one row for all, which nobody reads
    for (int64_t j = 0, n; j < columns; j += n) {
      n = columns - j;
      if (!ds.data && n > Tile::MOST_ELEMENTS) {
        // Short rows, whose db is summed in another order, are not what is left over.
        n = Tile::MOST_ELEMENTS - (n - Tile::MOST_ELEMENTS < tile().width ? tile().width : 0);
      }
      Map<T> map{rows,        n,     dy.data + j,           dy.rs,          ds.data ? ds.data + j : room, ds.rs,
                 dy.data + j, dy.rs, db ? db + j : nullptr, spec.parameters};
      if (saved.data) {
        map.saved = saved.data + j;
        map.ld_saved = saved.rs;
      }
      kernels.differentiate[static_cast<int>(spec.activation)](map);
    }
  }
};

// A tile of c as Gemm's `finished` hands it over.
struct Finished {
  float* c;
  int64_t ldc, i, j, rows, columns;
};

// Of the formats of 16 bits.
template <class S, class E>
struct Numbers {
  using Kernel = HalfKernels<S>;
  static constexpr bool DIRECT = false;
  static constexpr int64_t TERMS = Operands<E>::TERMS;
  const Kernel& kernels;
  const OperandKernels<S, E>& products;

  explicit Numbers(const Kernel& k) : kernels(k), products(k.template products<E>()) {}
  const Tile& tile() const { return kernels.tile; }
  int64_t kc() const { return products.kc; }

  bool is_operand(Matrix<const S> x, int64_t columns) const {
    return TERMS == 2 && x.cs == 1 && x.rs % 2 == 0 && columns % 2 == 0;
  }
  Matrix<const E> as_operand(Matrix<const S> x) const { return {reinterpret_cast<const E*>(x.data), x.rs / TERMS, 1}; }
  // Rows of any strides as operands at `to`, whose rows lie ld operands apart.
  void make_operands(Matrix<const S> x, int64_t rows, int64_t columns, E* to, int64_t ld) const {
    if constexpr (TERMS == 2) {
      S* pairs = reinterpret_cast<S*>(to);
      copy_rows(x, rows, columns, pairs, ld * TERMS);
      if (columns % 2) {
        for (int64_t i = 0; i < rows; ++i) pairs[i * ld * 2 + columns] = S{};
      }
    } else {
      widen(x, rows, columns, to, ld);
    }
  }
  void pack(Matrix<const S> b, int64_t k, int64_t n, int64_t panel, E* packed) const {
    products.pack(b, k, n, panel, packed);
  }
  // ds as the left operand of dw: operands along the batch, whose rows lie ld operands apart.
  void turn(Matrix<const S> ds, int64_t samples, int64_t columns, int64_t ld, E* to) const {
    if constexpr (TERMS == 1) {
      widen(ds, samples, columns, to, ld);
    } else {
      products.pack(ds, samples, columns, ld, to);
    }
  }
  void pack_activated(const LayerSpec& spec, Matrix<const S> s, int64_t k, int64_t n, int64_t panel, E* packed) const {
    float wide[Tile::MOST_ELEMENTS];
    S rounded[Tile::MOST_ELEMENTS];
    const int64_t depth = (k + TERMS - 1) / TERMS;
    for (int64_t j = 0; j < n; j += panel) {
      const int64_t columns = std::min(panel, n - j), most = Tile::MOST_ELEMENTS / columns / TERMS * TERMS;
      for (int64_t i = 0; i < k; i += most) {
        const int64_t rows = std::min(most, k - i);
        kernels.widen(rows, columns, s.data + i * s.rs + j, s.rs, wide, columns);
        kernels.activate[static_cast<int>(spec.activation)](
            {rows, columns, wide, columns, wide, columns, nullptr, 0, nullptr, spec.parameters});
        kernels.narrow(rows, columns, wide, columns, rounded, columns);
        products.pack({rounded, columns, 1}, rows, columns, panel, packed + j * depth + i / TERMS * panel);
      }
    }
  }

  void activated(Gemm<E>& g, const S* w, const LayerSpec& spec, int64_t first, Matrix<S> s, Matrix<S> x, Matrix<E> next,
                 Sums<E> sums) const {
    g.activation = spec.activation;
    g.parameters = spec.parameters;
    if (!s.data) g.after = After::Activate;
    const auto finished = [&](Finished tile) {
      tile.j += first;
      if (s.data) {
        narrow(tile, s);
        const Map<float> map{tile.rows, tile.columns, tile.c, tile.ldc, tile.c,
                             tile.ldc,  nullptr,      0,      nullptr,  spec.parameters};
        kernels.activate[static_cast<int>(spec.activation)](map);
      }
      if (x.data) narrow(tile, x);
      if (next.data) round_operands(tile, next, spec.out);
    };
    hand_over(g, finished, w ? g.k : products.kc, sums);
    if (w) {
      products.dot(g, w);
    } else {
      products.gemm(g);
    }
  }

  // Hands c over tile by tile, of sums that one cache block holds.
  template <class F>
  void multiply(Gemm<E>& g, const F& finished) const {
    hand_over(g, finished, g.k, {});
    products.gemm(g);
  }

  void differentiate(const LayerSpec& spec, Matrix<const S> dy, int64_t rows, int64_t columns, Matrix<const S> saved,
                     Matrix<S> ds, float* db) const {
    constexpr int64_t ROWS = 16, COLUMNS = Tile::MOST_ELEMENTS / ROWS;
    float block[ROWS * COLUMNS];
    for (int64_t i = 0; i < rows; i += ROWS) {
      for (int64_t j = 0; j < columns; j += COLUMNS) {
        const Finished tile{block, COLUMNS, i, j, std::min(ROWS, rows - i), std::min(COLUMNS, columns - j)};
        widen({dy.data + i * dy.rs + j * dy.cs, dy.rs, dy.cs}, tile.rows, tile.columns, block, COLUMNS);
        differentiate(spec, tile, saved, ds, db);
      }
    }
  }

  // A tile of float32 dx becomes ds.
  void differentiate(const LayerSpec& spec, const Finished& tile, Matrix<const S> saved, Matrix<S> ds,
                     float* db) const {
    float wide[Tile::MOST_ELEMENTS];
    Map<float> map{tile.rows, tile.columns, tile.c,   tile.ldc, tile.c,
                   tile.ldc,  tile.c,       tile.ldc, nullptr,  spec.parameters};
    if (saved.data) {
      kernels.widen(tile.rows, tile.columns, saved.data + tile.i * saved.rs + tile.j, saved.rs, wide, tile.columns);
      map.saved = wide;
      map.ld_saved = tile.columns;
    }
    if (db) map.db = db + tile.j;
    kernels.differentiate[static_cast<int>(spec.activation)](map);
    if (ds.data) narrow(tile, ds);
  }
  void narrow(const Finished& t, Matrix<S> out) const {
    kernels.narrow(t.rows, t.columns, t.c, t.ldc, out.data + t.i * out.rs + t.j, out.rs);
  }

 private:
  // c is handed over tile by tile to f; by way of `sums` where the sum is too long to stay in one tile.
  template <class F>
  static void hand_over(Gemm<E>& g, const F& f, int64_t kc, Sums<E> sums) {
    if (g.k > kc) {
      g.c = g.x = sums.data;
      g.ldc = g.ldx = sums.rs;
    }
    g.context = const_cast<F*>(&f);
    g.finished = [](void* context, float* c, int64_t ldc, int64_t i, int64_t j, int64_t rows, int64_t columns) {
      (*static_cast<const F*>(context))(Finished{c, ldc, i, j, rows, columns});
    };
  }
  void widen(Matrix<const S> x, int64_t rows, int64_t columns, float* to, int64_t ld) const {
    if (x.cs == 1) {
      kernels.widen(rows, columns, x.data, x.rs, to, ld);
      return;
    }
    S gathered[Tile::MOST_ELEMENTS];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += Tile::MOST_ELEMENTS) {
        const int64_t n = std::min<int64_t>(Tile::MOST_ELEMENTS, columns - j);
        copy_rows<S>({x.data + i * x.rs + j * x.cs, 0, x.cs}, 1, n, gathered, n);
        kernels.widen(1, n, gathered, n, to + i * ld + j, ld);
      }
    }
  }
  // Rounds a tile into operands: pairs are the rounded numbers themselves, float32 operands what they widen to.
  void round_operands(const Finished& t, Matrix<E> to, int64_t all_columns) const {
    if constexpr (TERMS == 2) {
      S* rows = reinterpret_cast<S*>(to.data) + t.i * to.rs * 2;
      kernels.narrow(t.rows, t.columns, t.c, t.ldc, rows + t.j, to.rs * 2);
      if (all_columns % 2 && t.j + t.columns == all_columns) {
        for (int64_t i = 0; i < t.rows; ++i) rows[i * to.rs * 2 + all_columns] = S{};
      }
    } else {
      S rounded[Tile::MOST_ELEMENTS];
      kernels.narrow(t.rows, t.columns, t.c, t.ldc, rounded, t.columns);
      kernels.widen(t.rows, t.columns, rounded, t.columns, to.data + t.i * to.rs + t.j, to.rs);
    }
  }
};

// f(numbers) with the operands that the kernels have.
template <class T, class F>
void with_numbers(const Kernels<T>& kernels, F f) {
  f(Numbers<T, T>(kernels));
}
template <class S, class F>
void with_numbers(const HalfKernels<S>& kernels, F f) {
  if constexpr (std::is_same_v<S, BFloat16>) {  // of which alone there are pairs
    if (kernels.paired.gemm) return f(Numbers<S, Pair>(kernels));
  }
  f(Numbers<S, float>(kernels));
}

template <class E>
int64_t operands(int64_t terms) {
  return (terms + Operands<E>::TERMS - 1) / Operands<E>::TERMS;
}

// The right-hand side b [k, n] of a product with m rows: read in place, or packed.
template <class S, class E>
struct Operand {
  Matrix<const S> b;
  int64_t k = 0, n = 0, panel = 0;  // panel 0: in place
  E* packed = nullptr;

  Operand() = default;
  Operand(const Numbers<S, E>& numbers, Matrix<const S> matrix, int64_t m, int64_t depth, int64_t columns)
      : b(matrix), k(depth), n(columns) {
    if constexpr (Numbers<S, E>::DIRECT) {
      if (matrix.data && reads_in_place(m, depth, matrix)) return;
    }
    panel = numbers.tile().vectors(m) * numbers.tile().width;
  }
  // Elements of `packed` for that many of the columns.
  int64_t room(int64_t columns) const { return panel ? (columns + panel - 1) / panel * panel * operands<E>(k) : 0; }
  // As many of the columns as take that many bytes, packed.
  int64_t fitting(int64_t bytes, Range all) const {
    if (panel == 0) return all.size();
    const int64_t bytes_of_panel = std::max<int64_t>(1, room(panel) * static_cast<int64_t>(sizeof(E)));
    return std::min(all.size(), std::max<int64_t>(1, bytes / bytes_of_panel) * panel);
  }
  // Some columns, with room of their own.
  Operand columns(Range some, E* room) const {
    Operand part = *this;
    part.b.data += some.begin * b.cs;
    part.n = some.size();
    part.packed = room;
    return part;
  }
  int64_t unit(const Tile& tile) const { return panel ? panel : tile.nr(); }
  void pack(const Numbers<S, E>& numbers, Range columns) const {
    if (panel == 0 || columns.size() <= 0) return;
    numbers.pack({b.data + columns.begin * b.cs, b.rs, b.cs}, k, columns.size(), panel,
                 packed + columns.begin * operands<E>(k));
  }
  void use(Gemm<E>& g, Range columns) const {
    g.n = columns.size();
    g.k = operands<E>(k);
    g.panel = panel;
    if (panel) {
      g.b = packed + columns.begin * g.k;
      g.ldb = g.k * panel;
    } else if constexpr (Numbers<S, E>::DIRECT) {
      g.b = b.data + columns.begin;
      g.ldb = b.rs;
    }
  }
};

}  // namespace pyperc
