// What the two ways through a backward pass share: who does which part, where everything lies, and what a thread does
// for one layer: ds, db, dw = ds^T x, and ds below or dx = ds w, of some rows and columns.
#pragma once

#include <vector>

#include "blocks.h"
#include "numbers.h"

namespace pyperc {

template <class S, class E>
class Gradients {
 public:
  using T = Sum<E>;
  using Weights = Operand<S, E>;
  static constexpr bool DIRECT = Numbers<S, E>::DIRECT;

  const Numbers<S, E> numbers;
  const Plan& plan;
  const Backward<S>& pass;
  const GradientSplit split;
  int lowest;     // the lowest layer whose ds is needed
  bool dy_is_ds;  // ds(L) is dy where it lies
  Scratch scratch;

  Gradients(const Numbers<S, E>& n, const Plan& p, const Backward<S>& b)
      : numbers(n), plan(p), pass(b), split(split_of(n, p, b)), ds_(b.depth), dw_(b.depth), db_(b.depth) {
    lowest = pass.wants_dx ? 0 : pass.depth;
    for (int l = pass.depth - 1; l >= 0; --l) {
      if (has_dw(l) || pass.layers[l].db) lowest = std::min(lowest, l);
    }
    // Where dx comes before dw, ds may not take the place of what dw still reads.
    if (!is_alone()) {
      for (int l = lowest; l < pass.depth; ++l) ds_[l] = pass.layers[l].ds;
    }
    const BackwardLayer<S>& last = pass.layers[pass.depth - 1];
    dy_is_ds = last.spec.activation == Activation::Identity && pass.dy.cs == 1;
    if (dy_is_ds) ds_[pass.depth - 1] = {const_cast<S*>(pass.dy.data), pass.dy.rs, 1};  // only read
  }

  // Whether w(l) is updated by the tiles of dw(l): not where dw is a sum of several, nor where others still read w
  // then.
  bool descends(int l) const {
    if (!pass.layers[l].descent) return false;
    return split == GradientSplit::Rows ? is_alone() : !has_product(l) || (l > 0 && owns_columns(l));
  }
  // Whether one thread goes through all layers once: it makes each dw when it is there.
  bool is_alone() const { return split == GradientSplit::Rows && plan.alone; }
  // Where dw(l) goes: where it is wanted, or to a buffer from which w(l) is updated.
  S* dw(int l) const { return dw_[l] ? dw_[l] : pass.layers[l].dw; }
  bool buffers_dw(int l) const { return pass.layers[l].descent && !descends(l); }
  void lay_out_dw(int l, Arena& arena) {
    if (buffers_dw(l)) dw_[l] = arena.take<S>(pass.layers[l].spec.out * pass.layers[l].spec.in);
  }
  void descend(int l, int64_t t) const {
    if constexpr (DIRECT) {
      const LayerSpec& spec = pass.layers[l].spec;
      const Range rows = part(spec.out, 1, t, plan.threads);
      if (buffers_dw(l) && rows.size()) {
        (*pass.layers[l].descent)(rows.begin, 0, rows.size(), spec.in, dw_[l] + rows.begin * spec.in, spec.in);
      }
    }
  }
  bool has_dw(int l) const { return pass.layers[l].wants_dw; }
  void begin_dw(int l, Memory& memory) const {
    if (has_dw(l) && !pass.layers[l].descent) memory.begin(l);
  }

  // Whether ds below, or dx, is wanted.
  bool has_product(int l) const { return l > lowest || pass.wants_dx; }
  int64_t ld_ds(int l) const { return padded(pass.layers[l].spec.out, sizeof(S)); }
  Range rows_of(int64_t t) const { return part(pass.batch, 1, t, plan.threads); }

  // ds(l) of the rows from i on: kept for the whole batch, or of a chunk, in one of the thread's buffers in turn.
  Matrix<S> ds(int l, int64_t t, int64_t i) const {
    if (keeps_ds(l)) return {ds_[l].data + i * ds_[l].rs, ds_[l].rs, 1};
    return {ring_ + (buffers_ * t + l % buffers_) * ring_size_, ld_ds(l), 1};
  }
  bool keeps_ds(int l) const { return ds_[l].data; }
  void lay_out_ds(int l, Arena& arena) { ds_[l] = {arena.take<S>(pass.batch * ld_ds(l)), ld_ds(l), 1}; }
  void lay_out_ring(Arena& arena) {
    int64_t widest = 0, passing = 0;
    for (int l = lowest; l < pass.depth; ++l) {
      if (keeps_ds(l)) continue;
      widest = std::max(widest, ld_ds(l));
      ++passing;
    }
    buffers_ = passing > 1 ? 2 : 1;
    ring_size_ = plan.chunk * widest;
    ring_ = arena.take<S>(plan.threads * buffers_ * ring_size_);
  }
  Matrix<const S> saved(int l, int64_t i) const { return rows_from(pass.layers[l].saved, i); }

  // Whether each thread takes columns of layer l's input, for dw and then for dx, which it may write over x: nobody
  // else reads those. Not where that would leave threads without work.
  bool owns_columns(int l) const {
    const int64_t units = (pass.layers[l].spec.in + numbers.tile().width - 1) / numbers.tile().width;
    return units % plan.threads == 0 || units >= 4 * plan.threads;
  }
  Range columns_of(int l, int64_t t) const {
    return part(pass.layers[l].spec.in, numbers.tile().width, t, plan.threads);
  }

  // db: each thread's sum where it has rows of its own, in T; thread 0 sums where db belongs if that is in T.
  bool shares_rows(int l) const { return split == GradientSplit::Rows || (l + 1 < pass.depth && !owns_columns(l + 1)); }
  void lay_out_db(Arena& arena) {
    for (int l = lowest; l < pass.depth; ++l) {
      if (!pass.layers[l].db) continue;
      const int64_t sums = shares_rows(l) ? plan.threads : 1;
      db_[l] = arena.take<T>((sums - (DIRECT ? 1 : 0)) * pass.layers[l].spec.out);
    }
  }
  T* db(int l, int64_t t) const {
    const BackwardLayer<S>& layer = pass.layers[l];
    if (!layer.db) return nullptr;
    if constexpr (DIRECT) {
      return t == 0 ? layer.db : db_[l] + (t - 1) * layer.spec.out;
    } else {
      return db_[l] + t * layer.spec.out;
    }
  }
  void clear_db(int l, int64_t t, Range columns) const {
    if (T* sum = db(l, t)) std::fill(sum + columns.begin, sum + columns.end, T(0));
  }
  void finish_db() const {
    for (int l = lowest; l < pass.depth; ++l) {
      T* const sum = db(l, 0);
      if (!sum) continue;
      const int64_t n = pass.layers[l].spec.out;
      for (int64_t t = 1; shares_rows(l) && t < plan.threads; ++t) add(sum, db(l, t), {0, n});
      if constexpr (!DIRECT) numbers.kernels.narrow(1, n, sum, 0, pass.layers[l].db, 0);
    }
  }
  static void add(T* sum, const T* more, Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) sum[i] += more[i];
  }

  // ds(L) = dy * f'(s(L)), db(L), for some rows and columns.
  void last_ds(int64_t t, Range rows, Range columns) const {
    const int l = pass.depth - 1;
    const auto at = [&](const auto& m) { return m.data ? m.data + columns.begin * m.cs : nullptr; };
    const Matrix<const S> dy = rows_from(pass.dy, rows.begin), s = saved(l, rows.begin);
    Matrix<S> out = ds(l, t, rows.begin);
    if (dy_is_ds) out.data = nullptr;
    T* const sum = db(l, t);
    if (columns.size() == 0 || (dy_is_ds && !sum)) return;
    numbers.differentiate(pass.layers[l].spec, {at(dy), dy.rs, dy.cs}, rows.size(), columns.size(), {at(s), s.rs, s.cs},
                          {at(out), out.rs, 1}, sum ? sum + columns.begin : nullptr);
  }

  // What a thread needs for a product of at most that many rows and columns.
  Sums<E> room_of_sums(int l, int64_t m, int64_t columns, Arena& arena) const {
    const int64_t ld = padded(columns, sizeof(T));
    return {needs_sums(l) ? arena.take<T>(m * ld) : nullptr, ld, 1};
  }
  bool needs_sums(int l) const {
    const LayerSpec& spec = pass.layers[l].spec;
    if (l == 0) return false;
    return numbers.needs_sums(spec.out, spec.in, pass.layers[l - 1].saved, {ds_[l - 1].data, ds_[l - 1].rs, 1});
  }
  // ds(l-1) = (ds(l) w(l)) * f'(s(l-1)) and db(l-1), or dx = ds(1) w(1), for rows [i, i + m) and some columns. w is
  // that part of the weight; of dx's it may be a block of its rows, from `begin` on, whose product is added.
  void product(int l, int64_t t, int64_t i, int64_t m, Range columns, const Weights& w, int64_t begin,
               Sums<E> sums) const {
    const Matrix<S> rows = ds(l, t, i);
    Gemm<E> g{};
    g.m = m;
    g.a = {rows.data + begin, rows.rs, 1};
    w.use(g, {0, columns.size()});
    if (l == 0) {
      numbers.added(g, begin == 0, {pass.dx.data + i * pass.dx.rs + columns.begin, pass.dx.rs, 1});
    } else {
      numbers.differentiated(g, pass.layers[l - 1].spec, columns.begin, saved(l - 1, i), ds(l - 1, t, i), db(l - 1, t),
                             sums);
    }
  }

  // x is packed where it is read from again, in blocks of the batch: half of it at most, as the whole would hold more
  // memory than plain torch, and what fills a cache block of the product.
  int64_t packed_depth() const { return numbers.kc() / 2; }
  int64_t packed_blocks(int64_t k) const {
    return k <= packed_depth() ? 1 : std::max<int64_t>(2, (k + numbers.kc() - 1) / numbers.kc());
  }
  struct Share {
    Range outs, ins;
  };
  Share whole(int l) const { return {{0, pass.layers[l].spec.out}, {0, pass.layers[l].spec.in}}; }
  Share share_of_dw(int l, int64_t t) const {
    const LayerSpec& spec = pass.layers[l].spec;
    // A weight that is updated here, and larger than x, stays with the threads that pack its rows in the next forward
    // pass.
    const bool rows =
        descends(l) && !has_product(l) && spec.out > pass.batch && spec.out >= plan.threads * numbers.tile().mr;
    if (!rows && (owns_columns(l) || spec.in >= spec.out)) return {{0, spec.out}, columns_of(l, t)};
    return {part(spec.out, 1, t, plan.threads), {0, spec.in}};
  }
  struct GradientRoom {
    int64_t blocks, columns;  // of the batch; of dw that are summed at once
    E *inputs, *a_block = nullptr;
    Sums<E> sums{};
    GradientRoom(const Gradients& of, int l, int64_t m, Share share, Arena& arena) : columns(share.ins.size()) {
      const bool descends = of.descends(l);
      const BackwardLayer<S>& layer = of.pass.layers[l];
      const Numbers<S, E>& numbers = of.numbers;
      const int64_t outs = share.outs.size();
      const Weights whole(numbers, layer.x, outs, m, columns);
      const bool near = of.ds_is_near(l);
      const int64_t unit = whole.unit(numbers.tile());
      const auto at_most = [&](int64_t bytes, int64_t bytes_of_one) {
        columns = std::min(columns, std::max<int64_t>(1, bytes / bytes_of_one / unit) * unit);
      };
      blocks = whole.panel ? of.packed_blocks(m) : 1;
      const int64_t rows_of_a = near ? 0 : std::min(outs, numbers.a_block() / numbers.kc());
      // What is packed has room of its own in fewer columns, for each of which ds is packed again, so that they may not
      // be very few; and in fewer samples, where sums wait in dw. A short batch needs no fewer samples.
      constexpr int64_t LEAST = 96, FEW = 512, NEAR = 128 * 1024;
      const auto packed = [&](int64_t n) { return (m + blocks - 1) / blocks * (rows_of_a + n); };
      const int64_t limit = std::min(thresholds().scratch_bytes, of.most_packed_) / static_cast<int64_t>(sizeof(E));
      const bool is_short = !descends && packed(FEW) <= limit;
      // Rounded as it is packed, so that fewer columns never take more room.
      const int64_t all = packed(whole.panel ? (columns + unit - 1) / unit * unit : 0);
      if (all > limit && (is_short || !near)) {
        if (descends) {
          at_most(std::max(LEAST, limit * blocks / m - rows_of_a), 1);
        } else {
          if (whole.panel) at_most(FEW, 1);
          const int64_t fitting = std::max<int64_t>(1, limit / (rows_of_a + (whole.panel ? columns : 0)));
          blocks = std::max(blocks, (m + fitting - 1) / fitting);
        }
      }
      const int64_t samples = (m + blocks - 1) / blocks;
      // A block of ds that stays in the cache may be read again and again, for few columns each.
      const int64_t bytes_of_x = samples * static_cast<int64_t>(sizeof(E));
      const bool stays = near && outs * bytes_of_x <= thresholds().chunk_bytes / 2;
      if (whole.panel && stays) at_most(NEAR, bytes_of_x);
      if (descends && (blocks > 1 || m > numbers.kc())) {
        at_most(of.plan.block_bytes, outs * static_cast<int64_t>(sizeof(T)));
        sums = {arena.take<T>(outs * columns), columns, 1};
      }
      inputs = arena.take<E>(Weights(numbers, layer.x, outs, samples, columns).room(columns));
      if (!near) a_block = arena.take<E>(rows_of_a * std::min(samples, numbers.kc()));
    }
  };
  // dw = ds^T x over rows [i, i + m) of the batch, for some rows and columns of dw; added to it where `adds`.
  void gradient(int l, int64_t t, int64_t i, int64_t m, Share share, S* dw, bool adds, Arena arena) const {
    const BackwardLayer<S>& layer = pass.layers[l];
    const auto [outs, ins] = share;
    if (outs.size() == 0 || ins.size() == 0) return;
    const GradientRoom room(*this, l, m, share, arena);
    for (int64_t j = ins.begin; j < ins.end; j += room.columns) {
      const int64_t columns = std::min(room.columns, ins.end - j);
      for (int64_t q = 0; q < room.blocks; ++q) {
        const Range samples = part(m, 1, q, room.blocks);
        const Matrix<S> rows = ds(l, t, i);
        Gemm<E> g{};
        g.m = outs.size();
        g.a = {rows.data + samples.begin * rows.rs + outs.begin, 1, rows.rs};
        g.a_block = room.a_block;
        const int64_t first = i + samples.begin;
        Weights b(numbers, input(l, first, j), outs.size(), samples.size(), columns);
        b.packed = room.inputs;
        if (b.panel) pack_input(l, {first, first + samples.size()}, {j, j + columns}, b.panel, room.inputs);
        b.use(g, {0, columns});
        if (descends(l)) {
          numbers.descended(g, q == 0, q + 1 == room.blocks, *layer.descent, outs.begin, j, room.sums);
        } else {
          numbers.added(g, q == 0 && !adds, {dw + outs.begin * layer.spec.in + j, layer.spec.in, 1});
        }
      }
    }
  }

  // What dw(l) reads, from a row and a column on; null where f(s) of the layer below takes its place.
  Matrix<const S> input(int l, int64_t i, int64_t j) const {
    Matrix<const S> x = rows_from(pass.layers[l].x, i);
    if (x.data) x.data += j * x.cs;
    return x;
  }
  void pack_input(int l, Range samples, Range columns, int64_t panel, E* to) const {
    if (const Matrix<const S> x = input(l, samples.begin, columns.begin); x.data) {
      numbers.pack(x, samples.size(), columns.size(), panel, to);
    } else {
      const Matrix<const S> s = saved(l - 1, samples.begin);
      numbers.pack_activated(pass.layers[l - 1].spec, {s.data + columns.begin, s.rs, 1}, samples.size(), columns.size(),
                             panel, to);
    }
  }

  // Whether dw reads ds(l) in place.
  bool ds_is_near(int l) const {
    const int64_t ld = keeps_ds(l) ? ds_[l].rs : ld_ds(l);
    return in_place(ld * static_cast<int64_t>(sizeof(E)));
  }

  // dw, and ds below or dx, in 16 bits: block by block, in what a thread keeps.
  void gradient_in_blocks(int l, int64_t t) const {
    const BackwardLayer<S>& layer = pass.layers[l];
    const auto [outs, ins] = share_of_dw(l, t);
    const Matrix<S> out{dw(l) + outs.begin * layer.spec.in + ins.begin, layer.spec.in, 1};
    const auto turn = [&, outs = outs](Range rows, Range samples, E* to) -> Matrix<const E> {
      const int64_t ld = padded(rows.size(), sizeof(E));
      const Matrix<S> from = ds(l, t, samples.begin);
      numbers.turn({from.data + outs.begin + rows.begin, from.rs, 1}, samples.size(), rows.size(), ld, to);
      return {to, 1, ld};
    };
    const auto pack = [&, ins = ins](Range samples, Range columns, int64_t panel, E* to) {
      pack_input(l, samples, {ins.begin + columns.begin, ins.begin + columns.end}, panel, to);
    };
    multiply_in_blocks(numbers, outs.size(), ins.size(), pass.batch, false, turn, pack,
                       [&](const Finished& tile) { numbers.narrow(tile, out); });
  }
  void product_in_blocks(int l, int64_t t, Range rows, Range columns) const {
    const Matrix<S> from = ds(l, t, rows.begin);
    const Matrix<const S> w = pass.layers[l].w;
    const bool in_place = numbers.is_operand({from.data, from.rs, 1}, pass.layers[l].spec.out);
    const auto operand = [&](Range some, Range terms, E* to) -> Matrix<const E> {
      const Matrix<const S> block{from.data + some.begin * from.rs + terms.begin, from.rs, 1};
      if (in_place) return numbers.as_operand(block);
      const int64_t ld = padded(operands<E>(terms.size()), sizeof(E));
      numbers.make_operands(block, some.size(), terms.size(), to, ld);
      return {to, ld, 1};
    };
    const auto pack = [&](Range terms, Range some, int64_t panel, E* to) {
      numbers.pack({w.data + terms.begin * w.rs + (columns.begin + some.begin) * w.cs, w.rs, w.cs}, terms.size(),
                   some.size(), panel, to);
    };
    const auto multiply = [&](auto finished) {
      multiply_in_blocks(numbers, rows.size(), columns.size(), pass.layers[l].spec.out, in_place, operand, pack,
                         finished);
    };
    if (l == 0) {
      const Matrix<S> dx{pass.dx.data + rows.begin * pass.dx.rs + columns.begin, pass.dx.rs, 1};
      multiply([&](const Finished& tile) { numbers.narrow(tile, dx); });
    } else {
      const Matrix<const S> s = saved(l - 1, rows.begin);
      const Matrix<S> below = ds(l - 1, t, rows.begin);
      T* const sum = db(l - 1, t);
      multiply([&](Finished tile) {
        tile.j += columns.begin;
        numbers.differentiate(pass.layers[l - 1].spec, tile, s, below, sum);
        // A line a row, far apart: fetched while the product makes the tile below, as no hardware prefetcher does.
        if (s.data) {
          const int64_t next = tile.i + tile.rows, end = std::min(next + tile.rows, rows.size());
          for (int64_t r = next; r < end; ++r) __builtin_prefetch(s.data + r * s.rs + tile.j);
        }
      });
    }
  }

  // What a thread does with room of its own. Beside `shared` bytes in what the first thread keeps, there is less for x
  // and ds, packed.
  template <class F>
  void lay_out_scratch(Arena& arena, size_t shared, F most) {
    constexpr size_t OTHERS = THREAD_MEMORY / 32;
    most_packed_ = static_cast<int64_t>(shared > 0 ? THREAD_MEMORY - OTHERS - shared : THREAD_MEMORY);
    scratch.lay_out(arena, plan.threads, most);
  }

  // dw(l), a thread's share of it.
  void make_dw(int l, int64_t t) const {
    if (!has_dw(l)) return;
    if constexpr (DIRECT) {
      gradient(l, t, 0, pass.batch, share_of_dw(l, t), dw(l), false, scratch.of(t));
    } else {
      gradient_in_blocks(l, t);
    }
  }

 private:
  static GradientSplit split_of(const Numbers<S, E>& numbers, const Plan& plan, const Backward<S>& pass) {
    if (plan.gradient == GradientSplit::Layers) return plan.gradient;
    std::vector<LayerSpec> layers(pass.depth);
    for (int l = 0; l < pass.depth; ++l) layers[l] = pass.layers[l].spec;
    return gradient_split(plan, numbers.tile(), sizeof(S), pass.batch, pass.wants_dx, layers);
  }

  std::vector<Matrix<S>> ds_;  // null: a chunk at a time, in ring_
  S* ring_ = nullptr;
  int64_t buffers_ = 1, ring_size_ = 0;  // of each thread
  std::vector<S*> dw_;                   // from which w is updated after the whole of it was read
  std::vector<T*> db_;
  int64_t most_packed_ = THREAD_MEMORY;  // of x and ds that are packed for dw
};

}  // namespace pyperc
