// The forward pass of the whole network: the loop over layers, who computes what, and the workspace.
#include <vector>

#include "numbers.h"

namespace pyperc {

namespace {

template <class S, class E>
class ForwardRun {
 public:
  ForwardRun(const Numbers<S, E>& numbers, const Plan& plan, const Forward<S>& pass)
      : numbers_(numbers), plan_(plan), pass_(pass), rows_{0, pass.batch}, layers_(pass.depth) {
    // Where nothing is kept for a backward pass, there is more room to pack.
    int64_t most = std::max(plan.packed_bytes, thresholds().chunk_bytes);
    for (int l = 0; l < pass.depth; ++l) {
      const LayerSpec& spec = pass.layers[l].spec;
      Layer& layer = layers_[l];
      layer.columns = spec.out;
      if (!dots(l)) {
        layer.weights = {numbers, transposed(pass.layers[l].w), plan.chunk, spec.in, spec.out};
        if (by_columns()) layer.columns = layer.weights.fitting(plan.block_bytes, share(l, plan.threads - 1).columns);
        layer.room = layer.weights.room(layer.columns);
      }
      if (pass.layers[l].s.data || (l + 1 < pass.depth && pass.layers[l].x.data)) most = plan.packed_bytes;
    }
    // Layers whose weights are packed together: as many as there is room for, and where columns are shared, one.
    int64_t bytes = 0;
    for (int l = 0; l < pass.depth; ++l) {
      bytes += layers_[l].room * static_cast<int64_t>(sizeof(E));
      const int64_t next = l + 1 < pass.depth ? layers_[l + 1].room * static_cast<int64_t>(sizeof(E)) : 0;
      layers_[l].ends = l + 1 == pass.depth || by_columns() || bytes + next > most;
      if (layers_[l].ends) bytes = 0;
      // x that nobody keeps has to wait in a buffer while the weights of the next layers are packed, or other threads
      // make its columns.
      if (layers_[l].ends && l + 1 < pass.depth && (by_columns() || !stored(l + 1).data)) waits_ = true;
    }
    bool buffered = false;
    for (int l = 1; l < pass.depth; ++l) buffered = buffered || !in_place(l);
    if (waits_ && buffered) blocks_ = std::max<int64_t>(1, pass.batch / plan.rows_at_once);
  }

  void operator()(const Parallel& parallel, Memory& memory) {
    const Workspace workspace(memory, [&](Arena& arena) { lay_out(arena); });
    if constexpr (!Numbers<S, E>::DIRECT) {
      for (int l = 0; l < pass_.depth; ++l) {
        const ForwardLayer<S>& layer = pass_.layers[l];
        if (layer.b) numbers_.kernels.widen(1, layer.spec.out, layer.b, 0, layers_[l].bias, 0);
      }
    }
    for (int64_t q = 0; q < blocks_; ++q) {
      rows_ = part(pass_.batch, 1, q, blocks_);
      block_of_rows(parallel);
    }
  }

 private:
  void block_of_rows(const Parallel& parallel) const {
    const int64_t threads = plan_.threads;
    if (by_columns()) {
      for (int l = 0; l < pass_.depth; ++l) {
        run(parallel, threads, [&](int64_t t) { blocks_of_columns(l, t); });
      }
      return;
    }
    for (int first = 0, end; first < pass_.depth; first = end) {
      end = segment_end(first);
      bool packs = false;
      for (int l = first; l < end; ++l) packs = packs || layers_[l].room > 0;
      if (packs) {
        run(parallel, threads, [&](int64_t t) {
          for (int l = first; l < end; ++l) {
            layers_[l].weights.pack(numbers_, part(pass_.layers[l].spec.out, unit(l), t, threads));
          }
        });
      }
      run(parallel, threads, [&](int64_t t) {
        const Range rows = rows_of(t);
        for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
          const int64_t m = std::min(plan_.chunk, rows.end - i);
          enter(first, t, i, m);
          for (int l = first; l < end; ++l) layer(l, t, i, m, {0, pass_.layers[l].spec.out}, layers_[l].weights);
        }
      });
    }
  }
  Range rows_of(int64_t t) const {
    const Range rows = part(rows_.size(), 1, t, plan_.threads);
    return {rows_.begin + rows.begin, rows_.begin + rows.end};
  }

  bool by_columns() const { return plan_.split == Split::Columns; }
  bool dots(int l) const { return reads_rows(plan_, pass_.layers[l].spec, pass_.layers[l].w); }
  int64_t unit(int l) const { return dots(l) ? 1 : layers_[l].weights.unit(numbers_.tile()); }

  // Where columns are shared: of a layer with too few of them, or where few do not end with a cache line, which two
  // threads would write, rows.
  struct Share {
    Range rows, columns;
  };
  Share share(int l, int64_t t) const {
    const int64_t threads = plan_.threads, out = pass_.layers[l].spec.out, units = (out + unit(l) - 1) / unit(l);
    const bool even = units % threads == 0 && out * static_cast<int64_t>(sizeof(S)) % 64 == 0;
    if (rows_.size() >= units * threads && !even && units < 4 * threads) return {rows_of(t), {0, out}};
    return {rows_, part(out, unit(l), t, threads)};
  }
  // A thread packs as many of its columns as stay in its cache, and multiplies all rows by them.
  void blocks_of_columns(int l, int64_t t) const {
    const auto [rows, columns] = share(l, t);
    const Layer& layer = layers_[l];
    for (int64_t j = columns.begin; j < columns.end; j += layer.columns) {
      const Range some{j, std::min(j + layer.columns, columns.end)};
      const Operand<S, E> weights = layer.weights.columns(some, layer.weights.packed + t * packed_);
      weights.pack(numbers_, {0, some.size()});
      for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
        const int64_t m = std::min(plan_.chunk, rows.end - i);
        if (j == columns.begin || m < rows.size()) enter(l, t, i, m);
        this->layer(l, t, i, m, some, weights);
      }
    }
  }

  int segment_end(int first) const {
    while (!layers_[first].ends) ++first;
    return first + 1;
  }

  void lay_out(Arena& arena) {
    int64_t taken = 0, widest[3] = {0, 0, 0}, sums = 0;
    packed_ = 0;
    for (const Layer& layer : layers_) {
      taken += layer.room;
      packed_ = std::max(packed_, taken);
      if (layer.ends) taken = 0;
    }
    E* const all = arena.take<E>(packed_ * (by_columns() ? plan_.threads : 1));
    for (Layer& layer : layers_) {
      layer.weights.packed = all + taken;
      taken = layer.ends ? 0 : taken + layer.room;
    }
    for (int l = 0; l < pass_.depth; ++l) {
      const LayerSpec& spec = pass_.layers[l].spec;
      if (!numbers_.DIRECT && pass_.layers[l].b) layers_[l].bias = arena.take<Sum<E>>(spec.out);
      if (!in_place(l)) widest[buffer(l)] = std::max(widest[buffer(l)], padded(operands<E>(spec.in), sizeof(E)));
      if (!numbers_.DIRECT && operands<E>(spec.in) > numbers_.kc()) sums = std::max(sums, layers_[l].columns);
    }
    const int64_t rows = plan_.threads * plan_.chunk, most = (pass_.batch + blocks_ - 1) / blocks_;
    for (int b = 0; b < 3; ++b) {
      buffers_[b] = {arena.take<E>((b > 0 && waits_ ? most : rows) * widest[b]), widest[b], 1};
    }
    ld_sums_ = padded(sums, sizeof(Sum<E>));
    sums_ = arena.take<Sum<E>>(rows * ld_sums_);
  }

  // What layer l reads, where it lies in memory; null for a hidden x that nobody keeps.
  Matrix<const S> stored(int l) const {
    if (l == 0) return pass_.x;
    const Matrix<S>& x = pass_.layers[l - 1].x;
    return {x.data, x.rs, x.cs};
  }
  // Whether the kernels read it there.
  bool in_place(int l) const {
    const Matrix<const S> x = stored(l);
    if (!x.data) return false;
    if (numbers_.DIRECT && l > 0) return true;  // a buffer of our own, padded
    if (numbers_.DIRECT && x.rs == 1 && x.cs != 1) return !dots(l);
    return numbers_.is_operand(x, pass_.layers[l].spec.in);
  }
  static int buffer(int l) { return l == 0 ? 0 : 1 + l % 2; }
  Matrix<E> buffer(int l, int64_t t, int64_t i) const {
    const Matrix<E>& b = buffers_[buffer(l)];
    return {b.data + (l > 0 && waits_ ? i - rows_.begin : t * plan_.chunk) * b.rs, b.rs, 1};
  }
  Matrix<const E> operand(int l, int64_t t, int64_t i) const {
    if (in_place(l)) return numbers_.as_operand(rows_from(stored(l), i));
    const Matrix<E> b = buffer(l, t, i);
    return {b.data, b.rs, 1};
  }
  // Rows [i, i + m) of what a segment begins with.
  void enter(int l, int64_t t, int64_t i, int64_t m) const {
    if (in_place(l) || (l > 0 && waits_)) return;
    const Matrix<E> to = buffer(l, t, i);
    numbers_.make_operands(rows_from(stored(l), i), m, pass_.layers[l].spec.in, to.data, to.rs);
  }

  // Rows [i, i + m) and some columns of x(l), with that part of the weight.
  void layer(int l, int64_t t, int64_t i, int64_t m, Range columns, const Operand<S, E>& weights) const {
    const ForwardLayer<S>& layer = pass_.layers[l];
    const Sum<E>* bias = layers_[l].bias;
    if constexpr (Numbers<S, E>::DIRECT) bias = layer.b;
    Gemm<E> g{};
    g.m = m;
    g.a = operand(l, t, i);
    g.init = bias ? bias + columns.begin : nullptr;
    const S* rows_of_w = nullptr;
    if (dots(l)) {
      rows_of_w = layer.w.data + columns.begin * layer.w.rs;
      g.n = columns.size();
      g.k = layer.spec.in;
      g.ldb = layer.w.rs;
    } else {
      weights.use(g, {0, columns.size()});
    }
    Matrix<E> next;
    if (l + 1 < pass_.depth && !in_place(l + 1)) next = buffer(l + 1, t, i);
    const auto from_row = [&](const Matrix<S>& x) { return Matrix<S>{x.data ? x.data + i * x.rs : nullptr, x.rs, 1}; };
    numbers_.activated(g, rows_of_w, layer.spec, columns.begin, from_row(layer.s), from_row(layer.x), next,
                       {sums_ + t * plan_.chunk * ld_sums_, ld_sums_, 1});
  }

  const Numbers<S, E> numbers_;
  const Plan& plan_;
  const Forward<S>& pass_;
  bool waits_ = false;  // hidden x of all rows of a block waits in a buffer, not a chunk for each thread
  int64_t blocks_ = 1;  // of the batch, so that less of it waits
  Range rows_;          // of the block
  struct Layer {
    Operand<S, E> weights;
    int64_t columns = 0;     // that a thread packs at once
    int64_t room = 0;        // of the packed weights
    bool ends = false;       // a segment
    Sum<E>* bias = nullptr;  // widened
  };
  std::vector<Layer> layers_;
  int64_t packed_ = 0;    // room for the packed weights of a segment; of each thread, where columns are shared
  Matrix<E> buffers_[3];  // what the first layer reads, the odd and the even ones, where that is not read in place
  Sum<E>* sums_ = nullptr;
  int64_t ld_sums_ = 0;
};

template <class S, class K>
void forward_with(const K& kernels, const Plan& plan, const Forward<S>& pass, const Parallel& parallel,
                  Memory& memory) {
  if (pass.batch == 0) return;
  with_numbers(kernels, [&](const auto& numbers) { ForwardRun(numbers, plan, pass)(parallel, memory); });
}

}  // namespace

template <class T>
void forward(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass, const Parallel& parallel,
             Memory& memory) {
  forward_with(kernels, plan, pass, parallel, memory);
}
template <class S>
void forward(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass, const Parallel& parallel,
             Memory& memory) {
  forward_with(kernels, plan, pass, parallel, memory);
}

#define PYPERC_INSTANTIATE(KERNELS, S) \
  template void forward<S>(const KERNELS<S>&, const Plan&, const Forward<S>&, const Parallel&, Memory&);
PYPERC_INSTANTIATE(Kernels, float)
PYPERC_INSTANTIATE(Kernels, double)
PYPERC_INSTANTIATE(HalfKernels, BFloat16)
PYPERC_INSTANTIATE(HalfKernels, Half)

}  // namespace pyperc
