// The whole network on the CPU: the loop over layers, who computes what, and one workspace.
#include "mlp.h"

#include <vector>

#include "pass.h"

namespace pyperc {

namespace {

// The right-hand side b [k, n] of a product whose left-hand side has m rows: read in place, or packed once for all.
template <class T>
struct Operand {
  Matrix<const T> b;
  int64_t k = 0, n = 0, panel = 0;  // panel 0: in place
  T* packed = nullptr;

  Operand() = default;
  // Always packed.
  Operand(const Tile& tile, int64_t m, int64_t depth, int64_t columns, Arena& arena) : k(depth), n(columns) {
    panel = tile.vectors(m) * tile.width;
    packed = arena.template take<T>((n + panel - 1) / panel * panel * k);
  }
  Operand(const Tile& tile, Matrix<const T> matrix, int64_t m, int64_t depth, int64_t columns, Arena& arena)
      : b(matrix), k(depth), n(columns) {
    if (reads_in_place(m, b)) return;
    panel = tile.vectors(m) * tile.width;
    packed = arena.template take<T>((n + panel - 1) / panel * panel * k);
  }
  void pack(const Kernels<T>& kernels, Range columns) const {
    if (panel == 0 || columns.size() <= 0) return;
    kernels.pack({b.data + columns.begin * b.cs, b.rs, b.cs}, k, columns.size(), panel, packed + columns.begin * k);
  }
  int64_t unit(const Tile& tile) const { return panel ? panel : tile.nr(); }
  // Packs f(s) instead of b: an input that was not kept, made again from the summation that was.
  void pack_activated(const Kernels<T>& kernels, const LayerSpec& spec, Matrix<const T> s) const {
    for (int64_t j = 0; j < n; j += panel) {
      const Map<T> map{k,       std::min(panel, n - j), s.data + j, s.rs, packed + j * k, panel, nullptr, 0,
                       nullptr, spec.parameters};
      kernels.activate[static_cast<int>(spec.activation)](map);
    }
  }
  void use(Gemm<T>& g, Range columns) const {
    g.n = columns.size();
    g.k = k;
    g.b = panel ? packed + columns.begin * k : b.data + columns.begin;
    g.ldb = panel ? k * panel : b.rs;
    g.panel = panel;
  }
};

template <class T>
class ForwardRun {
 public:
  ForwardRun(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass, void* workspace)
      : kernels_(kernels), plan_(plan), pass_(pass), arena_(workspace), weights_(pass.depth) {
    int64_t widest = 0;
    for (int l = 0; l < pass.depth; ++l) {
      const LayerSpec& spec = pass.layers[l].spec;
      if (!dots(l)) {
        weights_[l] = {kernels.tile, transposed(pass.layers[l].w), plan.chunk, spec.in, spec.out, arena_};
      }
      if (!pass.layers[l].x.data) widest = std::max(widest, spec.out);
    }
    const int64_t inputs = pass.layers[0].spec.in;
    const int64_t stride = pass.x.rs * static_cast<int64_t>(sizeof(T));
    const bool unit = pass.x.cs == 1 || (pass.x.rs == 1 && !dots(0));
    const bool collides = pass.x.cs == 1 && stride % 4096 == 0 && !dots(0);
    const int64_t buffers = plan.split == Split::Rows ? plan.threads : 1;
    if (!unit || collides) {
      ld_input_ = padded(inputs, sizeof(T));
      input_ = arena_.template take<T>(buffers * plan.chunk * ld_input_);
    }
    if (widest) {
      ld_hidden_ = padded(widest, sizeof(T));
      hidden_ = arena_.template take<T>(buffers * 2 * plan.chunk * ld_hidden_);
    }
  }
  size_t used() const { return arena_.used(); }

  void operator()(const Parallel& parallel) const {
    if (plan_.split == Split::Columns) {
      const Matrix<const T> x = input(0, 0, pass_.batch);
      for (int l = 0; l < pass_.depth; ++l) {
        run(parallel, plan_.threads, [&](int64_t t) {
          const Range columns = part(pass_.layers[l].spec.out, unit(l), t, plan_.threads);
          if (columns.size() == 0) return;
          if (!dots(l)) weights_[l].pack(kernels_, columns);
          layer(l, l ? output(l - 1, 0, 0) : x, 0, 0, pass_.batch, columns);
        });
      }
      return;
    }
    const auto pack = [&](int64_t t) {
      for (int l = 0; l < pass_.depth; ++l) {
        if (!dots(l)) weights_[l].pack(kernels_, part(pass_.layers[l].spec.out, unit(l), t, plan_.threads));
      }
    };
    run(parallel, plan_.threads, pack);
    run(parallel, plan_.threads, [&](int64_t t) {
      const Range rows = part(pass_.batch, 1, t, plan_.threads);
      for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
        const int64_t m = std::min(plan_.chunk, rows.end - i);
        Matrix<const T> x = input(t, i, m);
        for (int l = 0; l < pass_.depth; ++l) {
          layer(l, x, t, i, m, {0, pass_.layers[l].spec.out});
          x = output(l, t, i);
        }
      }
    });
  }

 private:
  bool dots(int l) const { return reads_rows(kernels_, plan_, pass_.layers[l].w); }
  int64_t unit(int l) const { return dots(l) ? 1 : weights_[l].unit(kernels_.tile); }

  // Rows [i, i + m) of the network's input, copied where its strides do not suit the kernels.
  Matrix<const T> input(int64_t t, int64_t i, int64_t m) const {
    const Matrix<const T> x = rows_from(pass_.x, i);
    if (!ld_input_) return x;
    T* copy = input_ + t * plan_.chunk * ld_input_;
    copy_rows(x, m, pass_.layers[0].spec.in, copy, ld_input_);
    return {copy, ld_input_, 1};
  }
  // Where x(l) of the rows from i on lies: where it is kept, or in one of the thread's two buffers in turn.
  Matrix<const T> output(int l, int64_t t, int64_t i) const {
    const Matrix<T>& x = pass_.layers[l].x;
    if (x.data) return {x.data + i * x.rs, x.rs, 1};
    return {hidden_ + (2 * t + l % 2) * plan_.chunk * ld_hidden_, ld_hidden_, 1};
  }
  void layer(int l, Matrix<const T> x, int64_t t, int64_t i, int64_t m, Range columns) const {
    const ForwardLayer<T>& layer = pass_.layers[l];
    const Matrix<const T> out = output(l, t, i);
    Gemm<T> g{};
    g.m = m;
    g.a = x;
    g.init = layer.b ? layer.b + columns.begin : nullptr;
    g.after = After::Activate;
    g.activation = layer.spec.activation;
    g.parameters = layer.spec.parameters;
    g.x = const_cast<T*>(out.data) + columns.begin;
    g.ldx = out.rs;
    g.c = layer.s.data ? layer.s.data + i * layer.s.rs + columns.begin : g.x;
    g.ldc = layer.s.data ? layer.s.rs : g.ldx;
    if (dots(l)) {
      g.n = columns.size();
      g.k = layer.spec.in;
      g.b = layer.w.data + columns.begin * layer.w.rs;
      g.ldb = layer.w.rs;
      kernels_.dot(g);
    } else {
      weights_[l].use(g, columns);
      kernels_.gemm(g);
    }
  }

  const Kernels<T>& kernels_;
  const Plan& plan_;
  const Forward<T>& pass_;
  Arena arena_;
  std::vector<Operand<T>> weights_;
  T *input_ = nullptr, *hidden_ = nullptr;
  int64_t ld_input_ = 0, ld_hidden_ = 0;
};

template <class T>
class BackwardRun {
 public:
  BackwardRun(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass, void* workspace)
      : kernels_(kernels),
        plan_(plan),
        pass_(pass),
        arena_(workspace),
        weights_(pass.depth),
        ds_(pass.depth),
        ld_ds_(pass.depth),
        partial_(pass.depth),
        partial_db_(pass.depth) {
    lowest_ = pass.dx.data ? 0 : pass.depth;
    for (int l = pass.depth - 1; l >= 0; --l) {
      if (pass.layers[l].dw || pass.layers[l].db) lowest_ = std::min(lowest_, l);
    }
    const int64_t others = plan.threads - 1;
    const bool by_rows = plan.gradient == GradientSplit::Rows;
    const int64_t depth_of_dw = by_rows ? plan.chunk : pass.batch;
    int64_t widest = 0, inputs = 0;
    bool far_apart = false;
    for (int l = lowest_; l < pass.depth; ++l) {
      const BackwardLayer<T>& layer = pass.layers[l];
      if (has_product(l)) weights_[l] = {kernels.tile, layer.w, plan.chunk, layer.spec.out, layer.spec.in, arena_};
      ld_ds_[l] = padded(layer.spec.out, sizeof(T));
      widest = std::max(widest, ld_ds_[l]);
      if (plan.gradient == GradientSplit::Tiles) ds_[l] = arena_.template take<T>(pass.batch * ld_ds_[l]);
      if (layer.dw) {
        inputs = std::max(inputs, packed_columns(layer));
        far_apart = far_apart || !reads_ds_in_place(l);
        if (by_rows && others) partial_[l] = arena_.template take<T>(others * layer.spec.out * layer.spec.in);
      }
      if (plan.split == Split::Rows && others && layer.db) {
        partial_db_[l] = arena_.template take<T>(others * layer.spec.out);
      }
    }
    if (by_rows) {
      ring_size_ = plan.chunk * widest;
      ring_ = arena_.template take<T>(plan.threads * 2 * ring_size_);
    }
    if (plan.gradient == GradientSplit::Layers) {
      T* two[] = {arena_.template take<T>(pass.batch * widest), arena_.template take<T>(pass.batch * widest)};
      for (int l = lowest_; l < pass.depth; ++l) ds_[l] = two[l % 2];
    }
    if (inputs) {
      inputs_size_ = inputs * depth_of_dw;
      inputs_ = arena_.template take<T>(plan.threads * inputs_size_);
    }
    if (far_apart) a_blocks_ = arena_.template take<T>(plan.threads * kernels.a_block);
  }
  size_t used() const { return arena_.used(); }

  void operator()(const Parallel& parallel) const {
    if (lowest_ == pass_.depth) return;
    const int64_t threads = plan_.threads;
    const bool columns = plan_.split == Split::Columns;
    if (!columns) {
      run(parallel, threads, [&](int64_t t) {
        for (int l = lowest_; l < pass_.depth; ++l) {
          if (weights_[l].panel) weights_[l].pack(kernels_, part(weights_[l].n, weights_[l].panel, t, threads));
        }
      });
    }
    switch (plan_.gradient) {
      case GradientSplit::Rows:
        run(parallel, threads, [&](int64_t t) { chain(t); });
        if (threads == 1) break;
        run(parallel, threads, [&](int64_t t) {
          for (int l = lowest_; l < pass_.depth; ++l) {
            const LayerSpec& spec = pass_.layers[l].spec;
            add(pass_.layers[l].dw, partial_[l], spec.out * spec.in, part(spec.out * spec.in, 16, t, threads));
          }
        });
        break;
      case GradientSplit::Tiles:
        run(parallel, threads, [&](int64_t t) { chain(t); });
        run(parallel, threads, [&](int64_t t) {
          for (int l = lowest_; l < pass_.depth; ++l) tile_of_dw(l, t);
        });
        break;
      case GradientSplit::Layers:
        run(parallel, columns ? 1 : threads, [&](int64_t t) {
          clear_db(t);
          const Range rows = columns ? Range{0, pass_.batch} : rows_of(t);
          last_ds(t, rows.begin, rows.size());
        });
        for (int l = pass_.depth - 1; l >= lowest_; --l) {
          run(parallel, threads, [&](int64_t t) {
            tile_of_dw(l, t);
            if (has_product(l)) share_of_product(l, t);
          });
        }
        break;
    }
    if (!columns && threads > 1) {
      for (int l = lowest_; l < pass_.depth; ++l) {
        const int64_t n = pass_.layers[l].spec.out;
        add(pass_.layers[l].db, partial_db_[l], n, {0, n});
      }
    }
  }

 private:
  // sum += the partial sums of the threads from the second on, in their order.
  void add(T* sum, const T* partial, int64_t size, Range range) const {
    if (!sum) return;
    for (int64_t t = 0; t + 1 < plan_.threads; ++t) {
      const T* p = partial + t * size;
      for (int64_t i = range.begin; i < range.end; ++i) sum[i] += p[i];
    }
  }

  Range rows_of(int64_t t) const { return part(pass_.batch, 1, t, plan_.threads); }
  bool has_product(int l) const { return l > lowest_ || (l == 0 && pass_.dx.data); }
  bool reads_ds_in_place(int l) const { return in_place(ld_ds_[l] * static_cast<int64_t>(sizeof(T))); }

  // ds(l) of the rows from i on: kept for the whole batch, or in one of the thread's two buffers in turn.
  T* ds(int l, int64_t t, int64_t i) const {
    return ds_[l] ? ds_[l] + i * ld_ds_[l] : ring_ + (2 * t + l % 2) * ring_size_;
  }
  T* db(int l, int64_t t) const {
    T* sum = pass_.layers[l].db;
    return !sum || t == 0 ? sum : partial_db_[l] + (t - 1) * pass_.layers[l].spec.out;
  }
  void clear_db(int64_t t) const {
    for (int l = lowest_; l < pass_.depth; ++l) {
      if (T* sum = db(l, t)) std::fill(sum, sum + pass_.layers[l].spec.out, T(0));
    }
  }

  // ds(L) = dy * f'(s(L)), db(L), for rows [i, i + m).
  void last_ds(int64_t t, int64_t i, int64_t m) const {
    const int l = pass_.depth - 1;
    const BackwardLayer<T>& layer = pass_.layers[l];
    Matrix<const T> dy = rows_from(pass_.dy, i);
    T* out = ds(l, t, i);
    if (dy.cs != 1) {
      copy_rows(dy, m, layer.spec.out, out, ld_ds_[l]);
      dy = {out, ld_ds_[l], 1};
    }
    Map<T> map{m, layer.spec.out, dy.data, dy.rs, out, ld_ds_[l], dy.data, dy.rs, db(l, t), layer.spec.parameters};
    if (layer.saved.data) {
      map.saved = layer.saved.data + i * layer.saved.rs;
      map.ld_saved = layer.saved.rs;
    }
    kernels_.differentiate[static_cast<int>(layer.spec.activation)](map);
  }

  // ds(l-1) = (ds(l) w(l)) * f'(s(l-1)) and db(l-1), or dx = ds(1) w(1), for rows [i, i + m) and some columns.
  void product(int l, int64_t t, int64_t i, int64_t m, Range columns) const {
    Gemm<T> g{};
    g.m = m;
    g.a = {ds(l, t, i), ld_ds_[l], 1};
    weights_[l].use(g, columns);
    if (l == 0) {
      g.c = pass_.dx.data + i * pass_.dx.rs + columns.begin;
      g.ldc = pass_.dx.rs;
    } else {
      const BackwardLayer<T>& below = pass_.layers[l - 1];
      g.c = ds(l - 1, t, i) + columns.begin;
      g.ldc = ld_ds_[l - 1];
      g.after = After::Differentiate;
      g.activation = below.spec.activation;
      g.parameters = below.spec.parameters;
      if (below.saved.data) g.saved = below.saved.data + i * below.saved.rs + columns.begin;
      g.ld_saved = below.saved.rs;
      g.db = db(l - 1, t) ? db(l - 1, t) + columns.begin : nullptr;
    }
    kernels_.gemm(g);
  }

  // A thread's rows through all layers.
  void chain(int64_t t) const {
    clear_db(t);
    const Range rows = rows_of(t);
    for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
      const int64_t m = std::min(plan_.chunk, rows.end - i);
      last_ds(t, i, m);
      for (int l = pass_.depth - 1; l >= lowest_; --l) {
        if (plan_.gradient == GradientSplit::Rows && pass_.layers[l].dw) {
          const LayerSpec& spec = pass_.layers[l].spec;
          T* sum = t == 0 ? pass_.layers[l].dw : partial_[l] + (t - 1) * spec.out * spec.in;
          gradient(l, t, i, m, {0, spec.out}, {0, spec.in}, sum, i > rows.begin);
        }
        if (has_product(l)) product(l, t, i, m, {0, pass_.layers[l].spec.in});
      }
    }
  }

  // A thread's rows, or columns, of one product.
  void share_of_product(int l, int64_t t) const {
    if (plan_.split == Split::Columns) {
      const Range columns = part(weights_[l].n, weights_[l].unit(kernels_.tile), t, plan_.threads);
      weights_[l].pack(kernels_, columns);
      if (columns.size()) product(l, 0, 0, pass_.batch, columns);
      return;
    }
    const Range rows = rows_of(t);
    for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
      product(l, t, i, std::min(plan_.chunk, rows.end - i), {0, pass_.layers[l].spec.in});
    }
  }

  // Columns that x takes when packed for dw, in panels of any width.
  int64_t packed_columns(const BackwardLayer<T>& layer) const {
    const int64_t panel = Tile::WIDEST * kernels_.tile.width;
    return (layer.spec.in + panel - 1) / panel * panel;
  }

  // Rows [i, i + m) of x(l-1) for dw(l): kept, or made again from s(l-1).
  Operand<T> input(int l, int64_t t, int64_t i, int64_t m, Range outs, Range ins) const {
    const BackwardLayer<T>& layer = pass_.layers[l];
    Arena packed(inputs_ + t * inputs_size_);
    if (layer.x.data) {
      Matrix<const T> x = rows_from(layer.x, i);
      x.data += ins.begin * x.cs;
      const Operand<T> b(kernels_.tile, x, outs.size(), m, ins.size(), packed);
      b.pack(kernels_, {0, ins.size()});
      return b;
    }
    const BackwardLayer<T>& below = pass_.layers[l - 1];
    Matrix<const T> s = rows_from(below.saved, i);
    s.data += ins.begin;
    const Operand<T> b(kernels_.tile, outs.size(), m, ins.size(), packed);
    b.pack_activated(kernels_, below.spec, s);
    return b;
  }

  // dw = ds^T x over rows [i, i + m) of the batch, for some rows and columns of dw; added to it where `adds`.
  void gradient(int l, int64_t t, int64_t i, int64_t m, Range outs, Range ins, T* dw, bool adds) const {
    const BackwardLayer<T>& layer = pass_.layers[l];
    const Operand<T> b = input(l, t, i, m, outs, ins);
    Gemm<T> g{};
    g.m = outs.size();
    g.a = {ds(l, t, i) + outs.begin, 1, ld_ds_[l]};
    if (!reads_ds_in_place(l)) g.a_block = a_blocks_ + t * kernels_.a_block;
    b.use(g, {0, ins.size()});
    g.c = dw + outs.begin * layer.spec.in + ins.begin;
    g.ldc = layer.spec.in;
    g.init = adds ? g.c : nullptr;
    g.ld_init = g.ldc;
    kernels_.gemm(g);
  }

  // A thread's columns, or rows, of dw over the whole batch.
  void tile_of_dw(int l, int64_t t) const {
    const BackwardLayer<T>& layer = pass_.layers[l];
    if (!layer.dw) return;
    const LayerSpec& spec = layer.spec;
    Range outs{0, spec.out}, ins{0, spec.in};
    if (spec.in >= spec.out) {
      ins = part(spec.in, kernels_.tile.nr(), t, plan_.threads);
    } else {
      outs = part(spec.out, 1, t, plan_.threads);
    }
    if (outs.size() && ins.size()) gradient(l, t, 0, pass_.batch, outs, ins, layer.dw, false);
  }

  const Kernels<T>& kernels_;
  const Plan& plan_;
  const Backward<T>& pass_;
  Arena arena_;
  int lowest_;  // the lowest layer whose ds is needed
  std::vector<Operand<T>> weights_;
  std::vector<T*> ds_;
  std::vector<int64_t> ld_ds_;
  std::vector<T*> partial_, partial_db_;
  T *ring_ = nullptr, *inputs_ = nullptr, *a_blocks_ = nullptr;
  int64_t ring_size_ = 0, inputs_size_ = 0;
};

}  // namespace

template <class T>
bool reads_rows(const Kernels<T>& kernels, const Plan& plan, Matrix<const T> w) {
  return plan.chunk <= std::min<int64_t>(kernels.dot_rows, thresholds().dot_rows) && w.cs == 1;
}

template <class T>
bool reads_in_place(int64_t m, Matrix<const T> b) {
  return b.cs == 1 && (m <= thresholds().few_rows || in_place(b.rs * static_cast<int64_t>(sizeof(T))));
}

template <class T>
size_t forward_workspace(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass) {
  return ForwardRun<T>(kernels, plan, pass, nullptr).used();
}

template <class T>
size_t backward_workspace(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass) {
  return BackwardRun<T>(kernels, plan, pass, nullptr).used();
}

template <class T>
void forward(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass, const Parallel& parallel,
             void* workspace) {
  if (pass.batch > 0) ForwardRun<T>(kernels, plan, pass, workspace)(parallel);
}

template <class T>
void backward(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass, const Parallel& parallel,
              void* workspace) {
  if (pass.batch > 0) {
    BackwardRun<T>(kernels, plan, pass, workspace)(parallel);
    return;
  }
  for (int l = 0; l < pass.depth; ++l) {
    const BackwardLayer<T>& layer = pass.layers[l];
    if (layer.dw) std::fill(layer.dw, layer.dw + layer.spec.out * layer.spec.in, T(0));
    if (layer.db) std::fill(layer.db, layer.db + layer.spec.out, T(0));
  }
}

#define PYPERC_INSTANTIATE(T)                                                                          \
  template bool reads_rows<T>(const Kernels<T>&, const Plan&, Matrix<const T>);                        \
  template bool reads_in_place<T>(int64_t, Matrix<const T>);                                           \
  template size_t forward_workspace<T>(const Kernels<T>&, const Plan&, const Forward<T>&);             \
  template size_t backward_workspace<T>(const Kernels<T>&, const Plan&, const Backward<T>&);           \
  template void forward<T>(const Kernels<T>&, const Plan&, const Forward<T>&, const Parallel&, void*); \
  template void backward<T>(const Kernels<T>&, const Plan&, const Backward<T>&, const Parallel&, void*);
PYPERC_INSTANTIATE(float)
PYPERC_INSTANTIATE(double)

}  // namespace pyperc
