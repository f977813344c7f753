// Networks that are stored in 16 bits: x, w, b, s and the gradients. OperandKernels sum in float32; each tile of a
// product gets its activation, or derivative, in float32 while it is in the first-level cache and is rounded once, when
// it is stored. dw and db are summed over the whole batch before they are rounded.
//
//              gemm             f              narrow
//   operands  ------>  c, s   ------>  f32   ---------->  x in 16 bits  ->  operands of the next layer
//
// Operands E are pairs of bfloat16, which are x itself where its rows hold whole pairs, or x widened to float32.
#include <vector>

#include "mlp.h"
#include "pass.h"

namespace pyperc {

namespace {

template <class E>
constexpr int64_t TERMS = Operands<E>::TERMS;

template <class E>
int64_t operands(int64_t terms) {
  return (terms + TERMS<E> - 1) / TERMS<E>;
}

// The right-hand side b [k, n] of a product, packed.
template <class S, class E>
struct HalfOperand {
  Matrix<const S> b;
  int64_t k = 0, n = 0, panel = 0;
  E* packed = nullptr;

  HalfOperand() = default;
  HalfOperand(const Tile& tile, Matrix<const S> matrix, int64_t m, int64_t depth, int64_t columns, Arena& arena)
      : b(matrix), k(depth), n(columns), panel(tile.vectors(m) * tile.width) {
    packed = arena.template take<E>((n + panel - 1) / panel * panel * operands<E>(k));
  }
  void pack(const OperandKernels<S, E>& products, Range columns) const {
    if (columns.size() <= 0) return;
    products.pack({b.data + columns.begin * b.cs, b.rs, b.cs}, k, columns.size(), panel,
                  packed + columns.begin * operands<E>(k));
  }
  void use(Gemm<E>& g, Range columns) const {
    g.n = columns.size();
    g.k = operands<E>(k);
    g.b = packed + columns.begin * g.k;
    g.ldb = g.k * panel;
    g.panel = panel;
  }
};

// A tile of c as Gemm's `finished` hands it over.
struct Finished {
  float* c;
  int64_t ldc, i, j, rows, columns;
};

// c is handed over tile by tile to f; with a buffer `sums` where the sum is too long to stay in one tile.
template <class E, class F>
void hand_over(Gemm<E>& g, const F& f, int64_t kc, float* sums, int64_t ld_sums) {
  if (g.k > kc) {
    g.c = g.x = sums;
    g.ldc = g.ldx = ld_sums;
  }
  g.context = const_cast<F*>(&f);
  g.finished = [](void* context, float* c, int64_t ldc, int64_t i, int64_t j, int64_t rows, int64_t columns) {
    (*static_cast<const F*>(context))(Finished{c, ldc, i, j, rows, columns});
  };
}

// Rows of any strides as operands at `to`, whose rows lie ld operands apart.
template <class S, class E>
void copy_operands(const HalfKernels<S>& kernels, Matrix<const S> from, int64_t rows, int64_t columns, E* to,
                   int64_t ld) {
  if constexpr (TERMS<E> == 2) {
    S* pairs = reinterpret_cast<S*>(to);
    copy_rows(from, rows, columns, pairs, ld * TERMS<E>);
    if (columns % 2) {
      for (int64_t i = 0; i < rows; ++i) pairs[i * ld * 2 + columns] = S{};
    }
  } else if (from.cs == 1) {
    kernels.widen(rows, columns, from.data, from.rs, to, ld);
  } else {
    S gathered[Tile::MOST_ELEMENTS];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; j += Tile::MOST_ELEMENTS) {
        const int64_t n = std::min<int64_t>(Tile::MOST_ELEMENTS, columns - j);
        copy_rows<S>({from.data + i * from.rs + j * from.cs, 0, from.cs}, 1, n, gathered, n);
        kernels.widen(1, n, gathered, n, to + i * ld + j, ld);
      }
    }
  }
}

// Rounds a tile into operands: pairs are the rounded numbers themselves, float32 operands what they widen to.
template <class S, class E>
void store_operands(const HalfKernels<S>& kernels, const Finished& t, E* rows, int64_t ld, int64_t all_columns) {
  if constexpr (TERMS<E> == 2) {
    S* to = reinterpret_cast<S*>(rows) + t.j;
    kernels.narrow(t.rows, t.columns, t.c, t.ldc, to, ld * 2);
    if (all_columns % 2 && t.j + t.columns == all_columns) {
      for (int64_t i = 0; i < t.rows; ++i) to[i * ld * 2 + t.columns] = S{};
    }
  } else {
    S rounded[Tile::MOST_ELEMENTS];
    kernels.narrow(t.rows, t.columns, t.c, t.ldc, rounded, t.columns);
    kernels.widen(t.rows, t.columns, rounded, t.columns, rows + t.j, ld);
  }
}

template <class S, class E>
class HalfForward {
 public:
  HalfForward(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass, void* workspace)
      : kernels_(kernels),
        products_(kernels.template products<E>()),
        plan_(plan),
        pass_(pass),
        arena_(workspace),
        weights_(pass.depth),
        biases_(pass.depth) {
    int64_t widest = 0;
    for (int l = 0; l < pass.depth; ++l) {
      const LayerSpec& spec = pass.layers[l].spec;
      if (!dots(l)) {
        weights_[l] = {kernels.tile, transposed(pass.layers[l].w), plan.chunk, spec.in, spec.out, arena_};
      }
      if (pass.layers[l].b) biases_[l] = arena_.template take<float>(spec.out);
      if (!in_place(l)) widest = std::max(widest, operands<E>(spec.in));
      if (operands<E>(spec.in) > products_.kc) ld_sums_ = std::max(ld_sums_, padded(spec.out, sizeof(float)));
    }
    const int64_t rows = (plan.split == Split::Rows ? plan.threads : 1) * plan.chunk;
    if (widest) {
      ld_operands_ = padded(widest, sizeof(E));
      operands_ = arena_.template take<E>(2 * rows * ld_operands_);
    }
    if (ld_sums_) sums_ = arena_.template take<float>(rows * ld_sums_);
  }
  size_t used() const { return arena_.used(); }

  void operator()(const Parallel& parallel) const {
    if (plan_.split == Split::Columns) {
      input(0, 0, pass_.batch);
      for (int l = 0; l < pass_.depth; ++l) {
        run(parallel, plan_.threads, [&](int64_t t) {
          const Range columns = part(pass_.layers[l].spec.out, unit(l), t, plan_.threads);
          if (columns.size() == 0) return;
          prepare(l, columns);
          layer(l, 0, 0, pass_.batch, columns);
        });
      }
      return;
    }
    run(parallel, plan_.threads, [&](int64_t t) {
      for (int l = 0; l < pass_.depth; ++l) prepare(l, part(pass_.layers[l].spec.out, unit(l), t, plan_.threads));
    });
    run(parallel, plan_.threads, [&](int64_t t) {
      const Range rows = part(pass_.batch, 1, t, plan_.threads);
      for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
        const int64_t m = std::min(plan_.chunk, rows.end - i);
        input(t, i, m);
        for (int l = 0; l < pass_.depth; ++l) layer(l, t, i, m, {0, pass_.layers[l].spec.out});
      }
    });
  }

 private:
  bool dots(int l) const { return reads_rows(kernels_, plan_, pass_.layers[l].w); }
  int64_t unit(int l) const { return dots(l) ? 1 : weights_[l].panel; }

  // What layer l reads, where it lies in memory; null for a hidden x that nobody keeps.
  Matrix<const S> stored(int l) const {
    if (l == 0) return pass_.x;
    const Matrix<S>& x = pass_.layers[l - 1].x;
    return {x.data, x.rs, x.cs};
  }
  // Whether that is operands already: rows of whole pairs that do not share cache sets.
  bool in_place(int l) const {
    const Matrix<const S> x = stored(l);
    const bool collides = x.rs * static_cast<int64_t>(sizeof(S)) % 4096 == 0 && !dots(l);
    return TERMS<E> == 2 && x.data && x.cs == 1 && x.rs % 2 == 0 && pass_.layers[l].spec.in % 2 == 0 && !collides;
  }
  E* buffer(int l, int64_t t) const { return operands_ + (2 * t + l % 2) * plan_.chunk * ld_operands_; }
  Matrix<const E> operand(int l, int64_t t, int64_t i) const {
    if (!in_place(l)) return {buffer(l, t), ld_operands_, 1};
    const Matrix<const S> x = stored(l);
    return {reinterpret_cast<const E*>(x.data + i * x.rs), x.rs / TERMS<E>, 1};
  }
  void input(int64_t t, int64_t i, int64_t m) const {
    if (!in_place(0)) {
      copy_operands(kernels_, rows_from(pass_.x, i), m, pass_.layers[0].spec.in, buffer(0, t), ld_operands_);
    }
  }

  void prepare(int l, Range columns) const {
    if (columns.size() == 0) return;
    if (!dots(l)) weights_[l].pack(products_, columns);
    if (biases_[l]) {
      kernels_.widen(1, columns.size(), pass_.layers[l].b + columns.begin, 0, biases_[l] + columns.begin, 0);
    }
  }

  void layer(int l, int64_t t, int64_t i, int64_t m, Range columns) const {
    const ForwardLayer<S>& layer = pass_.layers[l];
    Gemm<E> g{};
    g.m = m;
    g.a = operand(l, t, i);
    g.init = biases_[l] ? biases_[l] + columns.begin : nullptr;
    g.activation = layer.spec.activation;
    g.parameters = layer.spec.parameters;
    if (!layer.s.data) g.after = After::Activate;
    const auto finished = [&](Finished tile) {
      const int64_t row = i + tile.i;
      tile.j += columns.begin;
      if (layer.s.data) {
        kernels_.narrow(tile.rows, tile.columns, tile.c, tile.ldc, layer.s.data + row * layer.s.rs + tile.j,
                        layer.s.rs);
        const Map<float> map{tile.rows, tile.columns, tile.c, tile.ldc, tile.c,
                             tile.ldc,  nullptr,      0,      nullptr,  layer.spec.parameters};
        kernels_.activate[static_cast<int>(layer.spec.activation)](map);
      }
      if (layer.x.data) {
        kernels_.narrow(tile.rows, tile.columns, tile.c, tile.ldc, layer.x.data + row * layer.x.rs + tile.j,
                        layer.x.rs);
      }
      if (l + 1 < pass_.depth && !in_place(l + 1)) {
        store_operands(kernels_, tile, buffer(l + 1, t) + tile.i * ld_operands_, ld_operands_, layer.spec.out);
      }
    };
    if (dots(l)) {
      g.n = columns.size();
      g.k = layer.spec.in;
      g.ldb = layer.w.rs;
      hand_over(g, finished, g.k, nullptr, 0);
      products_.dot(g, layer.w.data + columns.begin * layer.w.rs);
    } else {
      weights_[l].use(g, columns);
      hand_over(g, finished, products_.kc, sums_ + t * plan_.chunk * ld_sums_ + columns.begin, ld_sums_);
      products_.gemm(g);
    }
  }

  const HalfKernels<S>& kernels_;
  const OperandKernels<S, E>& products_;
  const Plan& plan_;
  const Forward<S>& pass_;
  Arena arena_;
  std::vector<HalfOperand<S, E>> weights_;
  std::vector<float*> biases_;
  E* operands_ = nullptr;
  float* sums_ = nullptr;
  int64_t ld_operands_ = 0, ld_sums_ = 0;
};

// The rows of the batch are shared out for the chain of dx, which keeps ds of all layers; then the tiles of dw are.
template <class S, class E>
class HalfBackward {
 public:
  HalfBackward(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass, void* workspace)
      : kernels_(kernels),
        products_(kernels.template products<E>()),
        plan_(plan),
        pass_(pass),
        arena_(workspace),
        weights_(pass.depth),
        ds_(pass.depth),
        ld_ds_(pass.depth),
        db_(pass.depth) {
    // Pairs of samples stay together.
    chunk_ = operands<E>(plan.chunk) * TERMS<E>;
    lowest_ = pass.dx.data ? 0 : pass.depth;
    for (int l = pass.depth - 1; l >= 0; --l) {
      if (pass.layers[l].dw || pass.layers[l].db) lowest_ = std::min(lowest_, l);
    }
    int64_t widest = 0, inputs = 0, recomputed = 0;
    bool far_apart = false;
    for (int l = lowest_; l < pass.depth; ++l) {
      const BackwardLayer<S>& layer = pass.layers[l];
      const LayerSpec& spec = layer.spec;
      if (has_product(l)) {
        weights_[l] = {kernels.tile, layer.w, plan.chunk, spec.out, spec.in, arena_};
        if (operands<E>(spec.out) > products_.kc) ld_sums_ = std::max(ld_sums_, padded(spec.in, sizeof(float)));
      }
      ld_ds_[l] = padded(spec.out, sizeof(E));
      widest = std::max(widest, operands<E>(spec.out));
      if (TERMS<E> == 1 || layer.dw) ds_[l] = arena_.template take<E>(operands<E>(pass.batch) * ld_ds_[l]);
      if (layer.dw) {
        const int64_t panel = Tile::WIDEST * kernels.tile.width;
        inputs = std::max(inputs, (spec.in + panel - 1) / panel * panel);
        far_apart = far_apart || !reads_ds_in_place(l);
        for (int64_t t = 0; t < plan.threads && blocks() > 1; ++t) {
          dw_sums_size_ = std::max(dw_sums_size_, share_of_dw(l, t).size());
        }
        if (!layer.x.data) recomputed = std::max(recomputed, spec.in);
      }
      if (layer.db) db_[l] = arena_.template take<float>(plan.threads * spec.out);
    }
    if (TERMS<E> == 2) {
      ld_rows_ = padded(widest, sizeof(E));
      rows_ = arena_.template take<E>(plan.threads * 2 * chunk_ * ld_rows_);
    }
    if (ld_sums_) sums_ = arena_.template take<float>(plan.threads * chunk_ * ld_sums_);
    if (dw_sums_size_) dw_sums_ = arena_.template take<float>(plan.threads * dw_sums_size_);
    const int64_t samples = std::min(pass.batch, products_.kc * TERMS<E>);
    inputs_size_ = inputs * operands<E>(samples);
    inputs_ = arena_.template take<E>(plan.threads * inputs_size_);
    recomputed_size_ = recomputed * samples;
    recomputed_ = arena_.template take<S>(plan.threads * recomputed_size_);
    if (far_apart) a_blocks_ = arena_.template take<E>(plan.threads * products_.a_block);
  }
  size_t used() const { return arena_.used(); }

  void operator()(const Parallel& parallel) const {
    if (lowest_ == pass_.depth) return;
    const int64_t threads = plan_.threads;
    for (int l = lowest_; l < pass_.depth; ++l) {
      if (db_[l]) std::fill(db_[l], db_[l] + threads * pass_.layers[l].spec.out, 0.0f);
    }
    run(parallel, threads, [&](int64_t t) {
      for (int l = lowest_; l < pass_.depth; ++l) {
        if (has_product(l)) weights_[l].pack(products_, part(weights_[l].n, weights_[l].panel, t, threads));
      }
    });
    if (plan_.split == Split::Columns) {
      last_ds(0, 0, pass_.batch);
      for (int l = pass_.depth - 1; l >= lowest_; --l) {
        keep_for_dw(l, 0, 0, pass_.batch);
        if (!has_product(l)) continue;
        run(parallel, threads, [&](int64_t t) {
          const Range columns = part(weights_[l].n, weights_[l].panel, t, threads);
          if (columns.size()) product(l, 0, 0, pass_.batch, columns);
        });
      }
    } else {
      run(parallel, threads, [&](int64_t t) { chain(t); });
    }
    run(parallel, threads, [&](int64_t t) {
      for (int l = lowest_; l < pass_.depth; ++l) tile_of_dw(l, t);
    });
    for (int l = lowest_; l < pass_.depth; ++l) {
      if (!db_[l]) continue;
      const int64_t n = pass_.layers[l].spec.out;
      for (int64_t t = 1; t < threads; ++t) {
        for (int64_t j = 0; j < n; ++j) db_[l][j] += db_[l][t * n + j];
      }
      kernels_.narrow(1, n, db_[l], 0, pass_.layers[l].db, 0);
    }
  }

 private:
  bool has_product(int l) const { return l > lowest_ || (l == 0 && pass_.dx.data); }
  bool reads_ds_in_place(int l) const { return pyperc::in_place(ld_ds_[l] * static_cast<int64_t>(sizeof(E))); }

  // ds(l) of the rows from i on, as the left operand of dx = ds w.
  E* rows(int l, int64_t t, int64_t i) const {
    return TERMS<E> == 1 ? ds_[l] + i * ld_ds_[l] : rows_ + (2 * t + l % 2) * chunk_ * ld_rows_;
  }
  int64_t ld_rows(int l) const { return TERMS<E> == 1 ? ld_ds_[l] : ld_rows_; }
  // Pairs of samples as the left operand of dw = ds^T x: the chain's rows interleaved. float32 serves as it is.
  void keep_for_dw(int l, int64_t t, int64_t i, int64_t m) const {
    if constexpr (TERMS<E> == 2) {
      if (!pass_.layers[l].dw) return;
      const S* from = reinterpret_cast<const S*>(rows(l, t, i));
      products_.pack({from, 2 * ld_rows_, 1}, m, pass_.layers[l].spec.out, ld_ds_[l], ds_[l] + i / 2 * ld_ds_[l]);
    }
  }

  // ds(l) = dx * f'(saved) on a tile of float32 dx whose first row is row i of the batch, and db(l).
  void differentiate(int l, int64_t t, int64_t i, const Finished& tile) const {
    const BackwardLayer<S>& layer = pass_.layers[l];
    float saved[Tile::MOST_ELEMENTS];
    Map<float> map{tile.rows, tile.columns, tile.c,   tile.ldc, tile.c,
                   tile.ldc,  tile.c,       tile.ldc, nullptr,  layer.spec.parameters};
    if (layer.saved.data) {
      kernels_.widen(tile.rows, tile.columns, layer.saved.data + (i + tile.i) * layer.saved.rs + tile.j, layer.saved.rs,
                     saved, tile.columns);
      map.saved = saved;
      map.ld_saved = tile.columns;
      // A line a row, far apart: fetched while the product makes the tile below, as no hardware prefetcher does.
      const int64_t next = i + tile.i + tile.rows, end = std::min(next + tile.rows, pass_.batch);
      for (int64_t r = next; r < end; ++r) __builtin_prefetch(layer.saved.data + r * layer.saved.rs + tile.j);
    }
    if (db_[l]) map.db = db_[l] + t * layer.spec.out + tile.j;
    kernels_.differentiate[static_cast<int>(layer.spec.activation)](map);
    if constexpr (TERMS<E> == 2) {
      store_operands(kernels_, tile, rows(l, t, i) + tile.i * ld_rows_, ld_rows_, layer.spec.out);
    }
  }

  // ds(L) = dy * f'(s(L)), db(L), for rows [i, i + m).
  void last_ds(int64_t t, int64_t i, int64_t m) const {
    constexpr int64_t ROWS = 16, COLUMNS = Tile::MOST_ELEMENTS / ROWS;
    const int l = pass_.depth - 1;
    const int64_t n = pass_.layers[l].spec.out;
    float block[ROWS * COLUMNS];
    for (int64_t row = 0; row < m; row += ROWS) {
      for (int64_t j = 0; j < n; j += COLUMNS) {
        Finished tile{block, COLUMNS, row, j, std::min(ROWS, m - row), std::min(COLUMNS, n - j)};
        if constexpr (TERMS<E> == 1) {
          tile.c = rows(l, t, i) + row * ld_ds_[l] + j;
          tile.ldc = ld_ds_[l];
        }
        Matrix<const S> dy = rows_from(pass_.dy, i + row);
        dy.data += j * dy.cs;
        copy_operands(kernels_, dy, tile.rows, tile.columns, tile.c, tile.ldc);
        differentiate(l, t, i, tile);
      }
    }
  }

  // ds(l-1) = (ds(l) w(l)) * f'(s(l-1)) and db(l-1), or dx = ds(1) w(1), for rows [i, i + m) and some columns.
  void product(int l, int64_t t, int64_t i, int64_t m, Range columns) const {
    Gemm<E> g{};
    g.m = m;
    g.a = {rows(l, t, i), ld_rows(l), 1};
    weights_[l].use(g, columns);
    const auto finished = [&](Finished tile) {
      tile.j += columns.begin;
      if (l == 0) {
        kernels_.narrow(tile.rows, tile.columns, tile.c, tile.ldc, pass_.dx.data + (i + tile.i) * pass_.dx.rs + tile.j,
                        pass_.dx.rs);
      } else {
        differentiate(l - 1, t, i, tile);
      }
    };
    hand_over(g, finished, products_.kc, sums_ + t * chunk_ * ld_sums_ + columns.begin, ld_sums_);
    if constexpr (TERMS<E> == 1) {
      if (l > 0) {
        g.c = rows(l - 1, t, i) + columns.begin;
        g.ldc = ld_ds_[l - 1];
      }
    }
    products_.gemm(g);
  }

  // A thread's rows through all layers.
  void chain(int64_t t) const {
    const Range range = part(pass_.batch, TERMS<E>, t, plan_.threads);
    for (int64_t i = range.begin; i < range.end; i += chunk_) {
      const int64_t m = std::min(chunk_, range.end - i);
      last_ds(t, i, m);
      for (int l = pass_.depth - 1; l >= lowest_; --l) {
        keep_for_dw(l, t, i, m);
        if (has_product(l)) product(l, t, i, m, {0, pass_.layers[l].spec.in});
      }
    }
  }

  // Rows `samples` and columns `ins` of x(l-1): kept, or made again from s(l-1).
  Matrix<const S> input(int l, int64_t t, Range samples, Range ins) const {
    const Matrix<const S>& x = pass_.layers[l].x;
    if (x.data) return {x.data + samples.begin * x.rs + ins.begin * x.cs, x.rs, x.cs};
    const BackwardLayer<S>& below = pass_.layers[l - 1];
    S* out = recomputed_ + t * recomputed_size_;
    float block[Tile::MOST_ELEMENTS];
    for (int64_t i = 0; i < samples.size(); ++i) {
      const S* s = below.saved.data + (samples.begin + i) * below.saved.rs;
      for (int64_t j = ins.begin; j < ins.end; j += Tile::MOST_ELEMENTS) {
        const int64_t n = std::min<int64_t>(Tile::MOST_ELEMENTS, ins.end - j);
        kernels_.widen(1, n, s + j, 0, block, 0);
        kernels_.activate[static_cast<int>(below.spec.activation)](
            {1, n, block, 0, block, 0, nullptr, 0, nullptr, below.spec.parameters});
        kernels_.narrow(1, n, block, 0, out + i * ins.size() + j - ins.begin, 0);
      }
    }
    return {out, ins.size(), 1};
  }

  // dw = ds^T x is summed over blocks of samples that fill one cache block of the product, so that x is packed where it
  // is read from again.
  int64_t blocks() const {
    const int64_t k = operands<E>(pass_.batch);
    return (k + products_.kc - 1) / products_.kc;
  }
  Range block(int64_t q) const { return part(pass_.batch, TERMS<E>, q, blocks()); }

  // A thread's columns, or rows, of dw.
  struct Share {
    Range outs, ins;
    int64_t size() const { return outs.size() * ins.size(); }
  };
  Share share_of_dw(int l, int64_t t) const {
    const LayerSpec& spec = pass_.layers[l].spec;
    if (spec.in < spec.out) return {part(spec.out, 1, t, plan_.threads), {0, spec.in}};
    return {{0, spec.out}, part(spec.in, kernels_.tile.nr(), t, plan_.threads)};
  }
  void tile_of_dw(int l, int64_t t) const {
    const BackwardLayer<S>& layer = pass_.layers[l];
    const LayerSpec& spec = layer.spec;
    const auto [outs, ins] = share_of_dw(l, t);
    if (!layer.dw || outs.size() == 0 || ins.size() == 0) return;
    const int64_t corner = outs.begin * spec.in + ins.begin;
    float* sums = dw_sums_ + t * dw_sums_size_;
    const auto finished = [&](const Finished& tile) {
      kernels_.narrow(tile.rows, tile.columns, tile.c, tile.ldc, layer.dw + corner + tile.i * spec.in + tile.j,
                      spec.in);
    };
    for (int64_t q = 0; q < blocks(); ++q) {
      const Range samples = block(q);
      Arena packed(inputs_ + t * inputs_size_);
      const HalfOperand<S, E> b(kernels_.tile, input(l, t, samples, ins), outs.size(), samples.size(), ins.size(),
                                packed);
      b.pack(products_, {0, ins.size()});
      Gemm<E> g{};
      g.m = outs.size();
      g.a = {ds_[l] + samples.begin / TERMS<E> * ld_ds_[l] + outs.begin, 1, ld_ds_[l]};
      if (!reads_ds_in_place(l)) g.a_block = a_blocks_ + t * products_.a_block;
      b.use(g, {0, ins.size()});
      g.ld_init = g.ldc = ins.size();
      if (q > 0) g.init = sums;
      if (q + 1 < blocks()) {
        g.c = sums;
      } else {
        hand_over(g, finished, products_.kc, nullptr, 0);
      }
      products_.gemm(g);
    }
  }

  const HalfKernels<S>& kernels_;
  const OperandKernels<S, E>& products_;
  const Plan& plan_;
  const Backward<S>& pass_;
  Arena arena_;
  int lowest_;  // the lowest layer whose ds is needed
  int64_t chunk_;
  std::vector<HalfOperand<S, E>> weights_;
  std::vector<E*> ds_;
  std::vector<int64_t> ld_ds_;
  std::vector<float*> db_;
  E *rows_ = nullptr, *inputs_ = nullptr, *a_blocks_ = nullptr;
  S* recomputed_ = nullptr;
  float *sums_ = nullptr, *dw_sums_ = nullptr;
  int64_t ld_rows_ = 0, ld_sums_ = 0, dw_sums_size_ = 0, inputs_size_ = 0, recomputed_size_ = 0;
};

// f(E{}) with the operands that the kernels have.
template <class S, class F>
auto with_operands(const HalfKernels<S>& kernels, F f) {
  if constexpr (sizeof(OperandKernels<S, Pair>) > 0) {
    if (kernels.paired.gemm) return f(Pair{});
  }
  return f(0.0f);
}

}  // namespace

template <class S>
bool reads_rows(const HalfKernels<S>& kernels, const Plan& plan, Matrix<const S> w) {
  return plan.chunk <= std::min<int64_t>(kernels.dot_rows, thresholds().dot_rows) && w.cs == 1;
}

template <class S>
size_t forward_workspace(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass) {
  return with_operands(kernels,
                       [&](auto e) { return HalfForward<S, decltype(e)>(kernels, plan, pass, nullptr).used(); });
}

template <class S>
size_t backward_workspace(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass) {
  return with_operands(kernels,
                       [&](auto e) { return HalfBackward<S, decltype(e)>(kernels, plan, pass, nullptr).used(); });
}

template <class S>
void forward(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass, const Parallel& parallel,
             void* workspace) {
  if (pass.batch == 0) return;
  with_operands(kernels, [&](auto e) { HalfForward<S, decltype(e)>(kernels, plan, pass, workspace)(parallel); });
}

template <class S>
void backward(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass, const Parallel& parallel,
              void* workspace) {
  if (pass.batch > 0) {
    with_operands(kernels, [&](auto e) { HalfBackward<S, decltype(e)>(kernels, plan, pass, workspace)(parallel); });
    return;
  }
  for (int l = 0; l < pass.depth; ++l) {
    const BackwardLayer<S>& layer = pass.layers[l];
    if (layer.dw) std::fill(layer.dw, layer.dw + layer.spec.out * layer.spec.in, S{});
    if (layer.db) std::fill(layer.db, layer.db + layer.spec.out, S{});
  }
}

#define PYPERC_INSTANTIATE(S)                                                                              \
  template bool reads_rows<S>(const HalfKernels<S>&, const Plan&, Matrix<const S>);                        \
  template size_t forward_workspace<S>(const HalfKernels<S>&, const Plan&, const Forward<S>&);             \
  template size_t backward_workspace<S>(const HalfKernels<S>&, const Plan&, const Backward<S>&);           \
  template void forward<S>(const HalfKernels<S>&, const Plan&, const Forward<S>&, const Parallel&, void*); \
  template void backward<S>(const HalfKernels<S>&, const Plan&, const Backward<S>&, const Parallel&, void*);
PYPERC_INSTANTIATE(BFloat16)
PYPERC_INSTANTIATE(Half)

}  // namespace pyperc
