// The forward pass of the whole network: the loop over layers, who computes what, and the workspace.
#include <vector>

#include "numbers.h"

namespace pyperc {

namespace {

template <class S, class E>
class ForwardRun {
  static constexpr bool DIRECT = Numbers<S, E>::DIRECT;

 public:
  ForwardRun(const Numbers<S, E>& numbers, const Plan& plan, const Forward<S>& pass)
      : numbers_(numbers), plan_(plan), pass_(pass), chunk_(plan.chunk), rows_{0, pass.batch}, layers_(pass.depth) {
    // Where nothing is kept for a backward pass, there is more room to pack.
    int64_t most = std::max(plan.packed_bytes, thresholds().chunk_bytes);
    for (int l = 0; l < pass.depth; ++l) {
      const LayerSpec& spec = pass.layers[l].spec;
      Layer& layer = layers_[l];
      layer.columns = spec.out;
      if (!dots(l)) {
        layer.weights = {numbers, transposed(pass.layers[l].w), plan.chunk, spec.in, spec.out};
        if (by_columns()) layer.columns = layer.weights.fitting(plan.block_bytes, {0, most_columns(l)});
        layer.room = layer.weights.room(layer.columns);
      }
      if (pass.layers[l].s.data || (l + 1 < pass.depth && pass.layers[l].x.data)) most = plan.packed_bytes;
    }
    // Layers whose weights are packed together: as many as there is room for, and where columns are shared, one.
    int64_t bytes = 0;
    std::vector<int> waiting;
    for (int l = 0; l < pass.depth; ++l) {
      bytes += layers_[l].room * static_cast<int64_t>(sizeof(E));
      const int64_t next = l + 1 < pass.depth ? layers_[l + 1].room * static_cast<int64_t>(sizeof(E)) : 0;
      layers_[l].ends = l + 1 == pass.depth || by_columns() || bytes + next > most;
      if (layers_[l].ends) bytes = 0;
      // x that nobody keeps has to wait while the weights of the next layers are packed, or others make its columns.
      if (layers_[l].ends && l + 1 < pass.depth && !pass.layers[l].x.data) waiting.push_back(l);
    }
    lay_out_waiting(waiting);
    if (!waiting.empty()) blocks_ = std::max<int64_t>(1, pass.batch / plan.rows_at_once);
    for (int l = 0; l < pass.depth; ++l) {
      const int64_t k = operands<E>(pass.layers[l].spec.in);
      if (!in_place(l)) widest_[buffer(l)] = std::max(widest_[buffer(l)], padded(k, sizeof(E)));
      if (!DIRECT && !dots(l) && k > numbers.kc())
        ld_sums_ = std::max(ld_sums_, padded(layers_[l].columns, sizeof(Sum<E>)));
    }
    // Rows that are widened stay in the second-level cache, and within what a thread keeps.
    const int64_t row = (widest_[0] + widest_[1] + widest_[2]) * static_cast<int64_t>(sizeof(E)) +
                        ld_sums_ * static_cast<int64_t>(sizeof(Sum<E>));
    constexpr int64_t MOST = 128 * 1024;
    if (!DIRECT && row > 0) chunk_ = std::min(chunk_, std::max<int64_t>(numbers.tile().mr, MOST / row));
  }

  void operator()(const Parallel& parallel, Memory& memory) {
    const Workspace workspace(memory, [&](Arena& arena) { lay_out(arena); }, [&] { return scratch_.left(); });
    const Workspace waiting(
        memory, [&](Arena& arena) { make_room_to_wait(arena); }, [&] { return scratch_.left(workspace.kept()); });
    if constexpr (!DIRECT) {
      for (int l = 0; l < pass_.depth; ++l) {
        const ForwardLayer<S>& layer = pass_.layers[l];
        if (layer.b) numbers_.kernels.widen(1, layer.spec.out, layer.b, 0, layers_[l].bias, 0);
      }
    }
    for (int64_t q = 0; q < blocks_; ++q) {
      rows_ = part(pass_.batch, 1, q, blocks_);
      if (output_waits_) waiting_[1].data = output().data + rows_.begin * output().rs;
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
        const Chunk chunk = chunk_of(t);
        const Range rows = rows_of(t);
        for (int64_t i = rows.begin; i < rows.end; i += chunk_) {
          const int64_t m = std::min(chunk_, rows.end - i);
          enter(first, chunk, i, m);
          for (int l = first; l < end; ++l) layer(l, chunk, i, m, {0, pass_.layers[l].spec.out}, layers_[l].weights);
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
  int64_t most_columns(int l) const {
    int64_t most = 0;
    for (int64_t t = 0; t < plan_.threads; ++t) most = std::max(most, share(l, t).columns.size());
    return most;
  }
  // A thread packs as many of its columns as stay in its cache, and multiplies all rows by them.
  void blocks_of_columns(int l, int64_t t) const {
    const auto [rows, columns] = share(l, t);
    const Layer& layer = layers_[l];
    const Chunk chunk = chunk_of(t);
    for (int64_t j = columns.begin; j < columns.end; j += layer.columns) {
      const Range some{j, std::min(j + layer.columns, columns.end)};
      const Operand<S, E> weights = layer.weights.columns(some, chunk.packed);
      weights.pack(numbers_, {0, some.size()});
      for (int64_t i = rows.begin; i < rows.end; i += chunk_) {
        const int64_t m = std::min(chunk_, rows.end - i);
        if (j == columns.begin || m < rows.size()) enter(l, chunk, i, m);
        this->layer(l, chunk, i, m, some, weights);
      }
    }
  }

  // Two buffers in turn. The output is the second, as the last x that waits is in the first, if it has room, and its
  // rows do not lie on the same cache sets.
  void lay_out_waiting(const std::vector<int>& waiting) {
    output_waits_ = waiting.size() > 1 && output().rs * static_cast<int64_t>(sizeof(S)) % 4096 != 0;
    for (size_t i = 0; i < waiting.size(); ++i) {
      Layer& layer = layers_[waiting[i]];
      layer.waits = static_cast<int>((waiting.size() - 1 - i) % 2);
      Matrix<S>& room = waiting_[layer.waits];
      room.rs = std::max(room.rs, padded(pass_.layers[waiting[i]].spec.out, sizeof(S)));
      output_waits_ = output_waits_ && (layer.waits == 0 || pass_.layers[waiting[i]].spec.out <= output().rs);
    }
    if (output_waits_) waiting_[1].rs = output().rs;
  }
  void make_room_to_wait(Arena& arena) {
    const int64_t most = (pass_.batch + blocks_ - 1) / blocks_;
    waiting_[0].data = arena.take<S>(most * waiting_[0].rs);
    if (!output_waits_) waiting_[1].data = arena.take<S>(most * waiting_[1].rs);
  }
  const Matrix<S>& output() const { return pass_.layers[pass_.depth - 1].x; }

  int segment_end(int first) const {
    while (!layers_[first].ends) ++first;
    return first + 1;
  }

  void lay_out(Arena& arena) {
    int64_t taken = 0;
    packed_ = 0;
    for (const Layer& layer : layers_) {
      taken += layer.room;
      packed_ = std::max(packed_, taken);
      if (layer.ends) taken = 0;
    }
    E* const all = arena.take<E>(by_columns() ? 0 : packed_);
    for (int l = 0; l < pass_.depth; ++l) {
      Layer& layer = layers_[l];
      layer.weights.packed = all + taken;
      taken = layer.ends ? 0 : taken + layer.room;
      if (!DIRECT && pass_.layers[l].b) layer.bias = arena.take<Sum<E>>(pass_.layers[l].spec.out);
    }
    scratch_.lay_out(arena, plan_.threads, [&](auto most) { most([&](Arena& a) { (void)Chunk(*this, a); }); });
  }

  // A thread's own: of a chunk of rows, what the first layer reads, the odd and the even ones, where that is not read
  // in place, and sums that are not finished; its columns of the weight, where those are shared.
  struct Chunk {
    Matrix<E> buffers[3];
    Sums<E> sums;
    E* packed;
    Chunk(const ForwardRun& run, Arena& arena) {
      for (int b = 0; b < 3; ++b) buffers[b] = {arena.take<E>(run.chunk_ * run.widest_[b]), run.widest_[b], 1};
      sums = {arena.take<Sum<E>>(run.chunk_ * run.ld_sums_), run.ld_sums_, 1};
      packed = arena.take<E>(run.by_columns() ? run.packed_ : 0);
    }
  };
  Chunk chunk_of(int64_t t) const {
    Arena arena = scratch_.of(t);
    return {*this, arena};
  }
  static int buffer(int l) { return l == 0 ? 0 : 1 + l % 2; }

  // Where x(l) is stored: a hidden one that nobody keeps, only while it waits, and of the rows that go through now.
  bool is_stored(int l) const { return pass_.layers[l].x.data || layers_[l].waits >= 0; }
  Matrix<S> x(int l, int64_t i) const {
    const int w = layers_[l].waits;
    const Matrix<S>& all = w < 0 ? pass_.layers[l].x : waiting_[w];
    return {all.data ? all.data + (w < 0 ? i : i - rows_.begin) * all.rs : nullptr, all.rs, 1};
  }
  // What layer l reads, from row i on, where it is stored.
  Matrix<const S> input(int l, int64_t i) const {
    if (l == 0) return rows_from(pass_.x, i);
    const Matrix<S> below = x(l - 1, i);
    return {below.data, below.rs, below.cs};
  }
  // Whether the kernels read it there.
  bool in_place(int l) const {
    if (l > 0 && !is_stored(l - 1)) return false;
    if (DIRECT && l > 0) return true;  // a buffer of our own, padded
    const Matrix<const S> x = input(l, rows_.begin);
    if (DIRECT && x.rs == 1 && x.cs != 1) return !dots(l);
    return numbers_.is_operand(x, pass_.layers[l].spec.in);
  }
  // Rows [i, i + m) of what a segment begins with.
  void enter(int l, const Chunk& chunk, int64_t i, int64_t m) const {
    if (in_place(l)) return;
    const Matrix<E>& to = chunk.buffers[buffer(l)];
    numbers_.make_operands(input(l, i), m, pass_.layers[l].spec.in, to.data, to.rs);
  }

  // Rows [i, i + m) and some columns of x(l), with that part of the weight.
  void layer(int l, const Chunk& chunk, int64_t i, int64_t m, Range columns, const Operand<S, E>& weights) const {
    const ForwardLayer<S>& layer = pass_.layers[l];
    const Sum<E>* bias = layers_[l].bias;
    if constexpr (DIRECT) bias = layer.b;
    Gemm<E> g{};
    g.m = m;
    if (in_place(l)) {
      g.a = numbers_.as_operand(input(l, i));
    } else {
      const Matrix<E>& buffer = chunk.buffers[this->buffer(l)];
      g.a = {buffer.data, buffer.rs, 1};
    }
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
    if (!layers_[l].ends && !in_place(l + 1)) next = chunk.buffers[buffer(l + 1)];
    const Matrix<S> s{layer.s.data ? layer.s.data + i * layer.s.rs : nullptr, layer.s.rs, 1};
    numbers_.activated(g, rows_of_w, layer.spec, columns.begin, s, x(l, i), next, chunk.sums);
  }

  const Numbers<S, E> numbers_;
  const Plan& plan_;
  const Forward<S>& pass_;
  int64_t chunk_;
  int64_t blocks_ = 1;  // of the batch, so that less of it waits
  Range rows_;          // of the block
  struct Layer {
    Operand<S, E> weights;
    int64_t columns = 0;     // that a thread packs at once
    int64_t room = 0;        // of the packed weights
    bool ends = false;       // a segment
    int waits = -1;          // in which of two buffers x of all rows of a block waits, where nobody keeps it
    Sum<E>* bias = nullptr;  // widened
  };
  std::vector<Layer> layers_;
  Matrix<S> waiting_[2] = {{nullptr, 0, 1}, {nullptr, 0, 1}};
  bool output_waits_ = false;  // the second of them is the output
  int64_t packed_ = 0;         // room for the packed weights of a segment; of each thread, where columns are shared
  int64_t widest_[3] = {0, 0, 0}, ld_sums_ = 0;  // of a chunk
  Scratch scratch_;
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
