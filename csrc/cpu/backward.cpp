// The backward pass of the whole network: ds and db from layer to layer, dw and dx, and the workspace.
#include <optional>
#include <vector>

#include "blocks.h"
#include "numbers.h"

namespace pyperc {

namespace {

template <class S, class E>
class BackwardRun {
  using T = Sum<E>;
  using Weights = Operand<S, E>;
  static constexpr bool DIRECT = Numbers<S, E>::DIRECT;

 public:
  BackwardRun(const Numbers<S, E>& numbers, const Plan& plan, const Backward<S>& pass)
      : numbers_(numbers),
        plan_(plan),
        pass_(pass),
        split_(split_of(numbers, plan, pass)),
        weights_(pass.depth),
        ds_(pass.depth),
        dw_(pass.depth),
        partial_(pass.depth),
        db_(pass.depth) {
    lowest_ = pass.wants_dx ? 0 : pass.depth;
    for (int l = pass.depth - 1; l >= 0; --l) {
      if (pass.layers[l].wants_dw || pass.layers[l].db) lowest_ = std::min(lowest_, l);
    }
    // Where dx comes before dw, ds may not take the place of what dw still reads.
    if (split_ != GradientSplit::Tiles && !is_alone()) {
      for (int l = lowest_; l < pass.depth; ++l) ds_[l] = pass.layers[l].ds;
    }
    const BackwardLayer<S>& last = pass.layers[pass.depth - 1];
    dy_is_ds_ = last.spec.activation == Activation::Identity && pass.dy.cs == 1;
    if (dy_is_ds_) ds_[pass.depth - 1] = {const_cast<S*>(pass.dy.data), pass.dy.rs, 1};  // only read
  }

  void operator()(const Parallel& parallel, Memory& memory) {
    if (lowest_ == pass_.depth) return;
    const Workspace sums(memory, [&](Arena& arena) { lay_out_db(arena); });
    if constexpr (DIRECT) {
      if (split_ != GradientSplit::Layers) by_rows(parallel, memory);
    }
    if (split_ == GradientSplit::Layers) by_layers(parallel, memory);
    for (int l = lowest_; l < pass_.depth; ++l) finish_db(l);
  }

 private:
  static GradientSplit split_of(const Numbers<S, E>& numbers, const Plan& plan, const Backward<S>& pass) {
    if (plan.gradient == GradientSplit::Layers) return plan.gradient;
    std::vector<LayerSpec> layers(pass.depth);
    for (int l = 0; l < pass.depth; ++l) layers[l] = pass.layers[l].spec;
    return gradient_split(plan, numbers.tile(), sizeof(S), pass.batch, pass.wants_dx, layers);
  }
  // Whether w(l) is updated by the tiles of dw(l): not where dw is a sum of several, nor where others still read w
  // then.
  bool descends(int l) const {
    return DIRECT && pass_.layers[l].descent && (split_ != GradientSplit::Rows || is_alone()) &&
           (split_ != GradientSplit::Layers || !has_product(l) || (l > 0 && owns_columns(l)));
  }
  // Whether one thread goes through all layers once: it makes each dw when it is there.
  bool is_alone() const { return DIRECT && split_ == GradientSplit::Rows && plan_.alone; }
  // Where dw(l) goes: where it is wanted, or to a buffer from which w(l) is updated.
  S* dw(int l) const { return dw_[l] ? dw_[l] : pass_.layers[l].dw; }
  bool buffers_dw(int l) const { return DIRECT && pass_.layers[l].descent && !descends(l); }
  void lay_out_dw(int l, Arena& arena) {
    if (buffers_dw(l)) dw_[l] = arena.take<S>(pass_.layers[l].spec.out * pass_.layers[l].spec.in);
  }
  void descend(int l, int64_t t) const {
    if constexpr (DIRECT) {
      const LayerSpec& spec = pass_.layers[l].spec;
      const Range rows = part(spec.out, 1, t, plan_.threads);
      if (buffers_dw(l) && rows.size()) {
        (*pass_.layers[l].descent)(rows.begin, 0, rows.size(), spec.in, dw_[l] + rows.begin * spec.in, spec.in);
      }
    }
  }
  bool has_dw(int l) const { return pass_.layers[l].wants_dw; }

  bool has_product(int l) const { return l > lowest_ || (l == 0 && pass_.wants_dx); }
  int64_t ld_ds(int l) const { return padded(pass_.layers[l].spec.out, sizeof(S)); }
  Range rows_of(int64_t t) const { return part(pass_.batch, 1, t, plan_.threads); }

  // ds(l) of the rows from i on: kept for the whole batch, or in one of the thread's buffers in turn.
  Matrix<S> ds(int l, int64_t t, int64_t i) const {
    if (ds_[l].data) return {ds_[l].data + i * ds_[l].rs, ds_[l].rs, 1};
    return {ring_ + (buffers_ * t + l % buffers_) * ring_size_, ld_ds(l), 1};
  }
  Matrix<const S> saved(int l, int64_t i) const { return rows_from(pass_.layers[l].saved, i); }

  // Whether each thread takes columns of layer l's input, for dw and then for dx, which it may write over x: nobody
  // else reads those. Not where that would leave threads without work.
  bool owns_columns(int l) const {
    const int64_t units = (pass_.layers[l].spec.in + numbers_.tile().width - 1) / numbers_.tile().width;
    return units % plan_.threads == 0 || units >= 4 * plan_.threads;
  }
  Range columns_of(int l, int64_t t) const {
    return part(pass_.layers[l].spec.in, numbers_.tile().width, t, plan_.threads);
  }

  // db: each thread's sum where it has rows of its own, in T; thread 0 sums where db belongs if that is in T.
  bool shares_rows(int l) const {
    return split_ != GradientSplit::Layers || (l + 1 < pass_.depth && !owns_columns(l + 1));
  }
  void lay_out_db(Arena& arena) {
    for (int l = lowest_; l < pass_.depth; ++l) {
      if (!pass_.layers[l].db) continue;
      const int64_t sums = shares_rows(l) ? plan_.threads : 1;
      db_[l] = arena.take<T>((sums - (DIRECT ? 1 : 0)) * pass_.layers[l].spec.out);
    }
  }
  T* db(int l, int64_t t) const {
    const BackwardLayer<S>& layer = pass_.layers[l];
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
  void finish_db(int l) const {
    const int64_t n = pass_.layers[l].spec.out;
    T* const sum = db(l, 0);
    if (!sum) return;
    if (shares_rows(l)) {
      for (int64_t t = 1; t < plan_.threads; ++t) add(sum, db(l, t), {0, n});
    }
    if constexpr (!DIRECT) numbers_.kernels.narrow(1, n, sum, 0, pass_.layers[l].db, 0);
  }
  static void add(T* sum, const T* more, Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) sum[i] += more[i];
  }

  // ds(L) = dy * f'(s(L)), db(L), for some rows and columns.
  void last_ds(int64_t t, Range rows, Range columns) const {
    const int l = pass_.depth - 1;
    const auto at = [&](const auto& m) { return m.data ? m.data + columns.begin * m.cs : nullptr; };
    const Matrix<const S> dy = rows_from(pass_.dy, rows.begin), s = saved(l, rows.begin);
    Matrix<S> out = ds(l, t, rows.begin);
    if (dy_is_ds_) out.data = nullptr;
    T* const sum = db(l, t);
    if (columns.size() == 0 || (dy_is_ds_ && !sum)) return;
    numbers_.differentiate(pass_.layers[l].spec, {at(dy), dy.rs, dy.cs}, rows.size(), columns.size(),
                           {at(s), s.rs, s.cs}, {at(out), out.rs, 1}, sum ? sum + columns.begin : nullptr);
  }

  // What a thread needs for a product of at most that many rows and columns.
  struct ProductRoom {
    E* packed;
    Sums<E> sums;
    ProductRoom(const BackwardRun& run, int l, int64_t m, int64_t columns, int64_t packed_elements, Arena& arena) {
      packed = arena.take<E>(packed_elements);
      sums = {nullptr, padded(columns, sizeof(T)), 1};
      if (run.needs_sums(l)) sums.data = arena.take<T>(m * sums.rs);
    }
  };
  bool needs_sums(int l) const {
    const LayerSpec& spec = pass_.layers[l].spec;
    if (l == 0) return false;
    return numbers_.needs_sums(spec.out, spec.in, pass_.layers[l - 1].saved, {ds_[l - 1].data, ds_[l - 1].rs, 1});
  }
  // ds(l-1) = (ds(l) w(l)) * f'(s(l-1)) and db(l-1), or dx = ds(1) w(1), for rows [i, i + m) and some columns. w is
  // that part of the weight; of dx's it may be a block of its rows, from `begin` on, whose product is added.
  void product(int l, int64_t t, int64_t i, int64_t m, Range columns, const Weights& w, int64_t begin,
               const ProductRoom& room) const {
    const Matrix<S> rows = ds(l, t, i);
    Gemm<E> g{};
    g.m = m;
    g.a = {rows.data + begin, rows.rs, 1};
    w.use(g, {0, columns.size()});
    if (l == 0) {
      numbers_.added(g, begin == 0, {pass_.dx.data + i * pass_.dx.rs + columns.begin, pass_.dx.rs, 1});
    } else {
      numbers_.differentiated(g, pass_.layers[l - 1].spec, columns.begin, saved(l - 1, i), ds(l - 1, t, i),
                              db(l - 1, t), room.sums);
    }
  }

  // x is packed where it is read from again, in blocks of the batch: half of it at most, as the whole would hold more
  // memory than plain torch, and what fills a cache block of the product.
  int64_t packed_depth() const { return numbers_.kc() / 2; }
  int64_t packed_blocks(int64_t k) const {
    return k <= packed_depth() ? 1 : std::max<int64_t>(2, (k + numbers_.kc() - 1) / numbers_.kc());
  }
  struct Share {
    Range outs, ins;
  };
  Share share_of_dw(int l, int64_t t) const {
    const LayerSpec& spec = pass_.layers[l].spec;
    // A weight that is updated here, and larger than x, stays with the threads that pack its rows in the next forward
    // pass.
    const bool rows =
        descends(l) && !has_product(l) && spec.out > pass_.batch && spec.out >= plan_.threads * numbers_.tile().mr;
    if (!rows && (owns_columns(l) || spec.in >= spec.out)) return {{0, spec.out}, columns_of(l, t)};
    return {part(spec.out, 1, t, plan_.threads), {0, spec.in}};
  }
  struct GradientRoom {
    int64_t blocks, columns;  // of the batch; of dw that are summed at once
    E *inputs, *a_block = nullptr;
    Sums<E> sums{};
    GradientRoom(const BackwardRun& run, int l, int64_t m, Share share, Arena& arena) : columns(share.ins.size()) {
      const bool descends = run.descends(l);
      const BackwardLayer<S>& layer = run.pass_.layers[l];
      const Numbers<S, E>& numbers = run.numbers_;
      const int64_t outs = share.outs.size();
      const Weights whole(numbers, layer.x, outs, m, columns);
      const bool near = run.ds_is_near(l);
      const int64_t unit = whole.unit(numbers.tile());
      const auto at_most = [&](int64_t bytes, int64_t bytes_of_one) {
        columns = std::min(columns, std::max<int64_t>(1, bytes / bytes_of_one / unit) * unit);
      };
      blocks = whole.panel ? run.packed_blocks(m) : 1;
      const int64_t rows_of_a = near ? 0 : std::min(outs, numbers.a_block() / numbers.kc());
      // What is packed has room of its own in fewer columns, for each of which ds is packed again, so that they may not
      // be very few; and in fewer samples, where sums wait in dw. A short batch needs no fewer samples.
      constexpr int64_t LEAST = 96, FEW = 512, NEAR = 128 * 1024;
      const auto packed = [&](int64_t n) { return (m + blocks - 1) / blocks * (rows_of_a + n); };
      const int64_t limit = std::min(thresholds().scratch_bytes, run.most_scratch_) / static_cast<int64_t>(sizeof(E));
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
        at_most(run.plan_.block_bytes, outs * static_cast<int64_t>(sizeof(T)));
        sums = {arena.take<T>(outs * columns), columns, 1};
      }
      inputs = arena.take<E>(Weights(numbers, layer.x, outs, samples, columns).room(columns));
      if (!near) a_block = arena.take<E>(rows_of_a * std::min(samples, numbers.kc()));
    }
  };
  // dw = ds^T x over rows [i, i + m) of the batch, for some rows and columns of dw; added to it where `adds`.
  void gradient(int l, int64_t t, int64_t i, int64_t m, Share share, S* dw, bool adds, Arena arena) const {
    const BackwardLayer<S>& layer = pass_.layers[l];
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
        Matrix<const S> x = rows_from(layer.x, i + samples.begin);
        if (x.data) x.data += j * x.cs;
        Weights b(numbers_, x, outs.size(), samples.size(), columns);
        b.packed = room.inputs;
        if (x.data) {
          b.pack(numbers_, {0, columns});
        } else {
          Matrix<const S> s = saved(l - 1, i + samples.begin);
          s.data += j;
          numbers_.pack_activated(pass_.layers[l - 1].spec, s, samples.size(), columns, b.panel, room.inputs);
        }
        b.use(g, {0, columns});
        if (descends(l)) {
          numbers_.descended(g, q == 0, q + 1 == room.blocks, *layer.descent, outs.begin, j, room.sums);
        } else {
          numbers_.added(g, q == 0 && !adds, {dw + outs.begin * layer.spec.in + j, layer.spec.in, 1});
        }
      }
    }
  }

  // Whether dw reads ds(l) in place.
  bool ds_is_near(int l) const {
    const int64_t ld = ds_[l].data ? ds_[l].rs : ld_ds(l);
    return in_place(ld * static_cast<int64_t>(sizeof(E)));
  }

  // dw, and ds below or dx, in 16 bits: block by block, in what a thread keeps.
  void gradient_in_blocks(int l, int64_t t) const {
    const BackwardLayer<S>& layer = pass_.layers[l];
    const auto [outs, ins] = share_of_dw(l, t);
    const Matrix<S> out{dw(l) + outs.begin * layer.spec.in + ins.begin, layer.spec.in, 1};
    const auto turn = [&, outs = outs](Range rows, Range samples, E* to) -> Matrix<const E> {
      const int64_t ld = padded(rows.size(), sizeof(E));
      const Matrix<S> from = ds(l, t, samples.begin);
      numbers_.turn({from.data + outs.begin + rows.begin, from.rs, 1}, samples.size(), rows.size(), ld, to);
      return {to, 1, ld};
    };
    const auto pack = [&, ins = ins](Range samples, Range columns, int64_t panel, E* to) {
      const Matrix<const S> x = rows_from(layer.x, samples.begin);
      const int64_t first = ins.begin + columns.begin;
      if (x.data) {
        numbers_.pack({x.data + first * x.cs, x.rs, x.cs}, samples.size(), columns.size(), panel, to);
      } else {
        const Matrix<const S> s = saved(l - 1, samples.begin);
        numbers_.pack_activated(pass_.layers[l - 1].spec, {s.data + first, s.rs, 1}, samples.size(), columns.size(),
                                panel, to);
      }
    };
    multiply_in_blocks(numbers_, outs.size(), ins.size(), pass_.batch, false, turn, pack,
                       [&](const Finished& tile) { numbers_.narrow(tile, out); });
  }
  void product_in_blocks(int l, int64_t t, Range rows, Range columns) const {
    const Matrix<S> from = ds(l, t, rows.begin);
    const Matrix<const S> w = pass_.layers[l].w;
    const bool in_place = numbers_.is_operand({from.data, from.rs, 1}, pass_.layers[l].spec.out);
    const auto operand = [&](Range some, Range terms, E* to) -> Matrix<const E> {
      const Matrix<const S> block{from.data + some.begin * from.rs + terms.begin, from.rs, 1};
      if (in_place) return numbers_.as_operand(block);
      const int64_t ld = padded(operands<E>(terms.size()), sizeof(E));
      numbers_.make_operands(block, some.size(), terms.size(), to, ld);
      return {to, ld, 1};
    };
    const auto pack = [&](Range terms, Range some, int64_t panel, E* to) {
      numbers_.pack({w.data + terms.begin * w.rs + (columns.begin + some.begin) * w.cs, w.rs, w.cs}, terms.size(),
                    some.size(), panel, to);
    };
    const auto multiply = [&](auto finished) {
      multiply_in_blocks(numbers_, rows.size(), columns.size(), pass_.layers[l].spec.out, in_place, operand, pack,
                         finished);
    };
    if (l == 0) {
      const Matrix<S> dx{pass_.dx.data + rows.begin * pass_.dx.rs + columns.begin, pass_.dx.rs, 1};
      multiply([&](const Finished& tile) { numbers_.narrow(tile, dx); });
    } else {
      const Matrix<const S> s = saved(l - 1, rows.begin);
      const Matrix<S> below = ds(l - 1, t, rows.begin);
      T* const sum = db(l - 1, t);
      multiply([&](Finished tile) {
        tile.j += columns.begin;
        numbers_.differentiate(pass_.layers[l - 1].spec, tile, s, below, sum);
        // A line a row, far apart: fetched while the product makes the tile below, as no hardware prefetcher does.
        if (s.data) {
          const int64_t next = tile.i + tile.rows, end = std::min(next + tile.rows, rows.size());
          for (int64_t r = next; r < end; ++r) __builtin_prefetch(s.data + r * s.rs + tile.j);
        }
      });
    }
  }

  // f(arena) with the thread's own scratch memory, the same for whatever it does next: what it keeps, if that will do.
  template <class F>
  void with_scratch(int64_t t, F f) const {
    f(Arena(scratch_ ? scratch_ + t * static_cast<int64_t>(scratch_size_) : thread_memory(), scratch_size_));
  }
  template <class F>
  void lay_out_scratch(Arena& arena, F most) {
    scratch_size_ = 0;
    most([&](auto room) {
      Arena count = Arena::counting();
      room(count);
      scratch_size_ = std::max(scratch_size_, count.used());
    });
    scratch_ = nullptr;
    if (scratch_size_ > THREAD_MEMORY) {
      scratch_ = arena.take<char>(plan_.threads * static_cast<int64_t>(scratch_size_));
    }
  }

  // Rows and Tiles: a thread's rows go through all layers, chunk by chunk.
  void by_rows(const Parallel& parallel, Memory& memory) {
    const int64_t threads = plan_.threads;
    const bool sums_dw = split_ == GradientSplit::Rows;
    if (!is_alone()) {
      for (int l = pass_.depth - 1; l >= lowest_; --l) begin_dw(l, memory);
      if (pass_.wants_dx) memory.begin_dx();
    }
    bool packs = false;
    for (int l = lowest_; l < pass_.depth; ++l) {
      const LayerSpec& spec = pass_.layers[l].spec;
      if (has_product(l)) weights_[l] = {numbers_, pass_.layers[l].w, plan_.chunk, spec.out, spec.in};
      packs = packs || weights_[l].panel;
    }
    const auto lay_out = [&](Arena& arena) {
      int64_t widest = 0, passing = 0;
      for (int l = lowest_; l < pass_.depth; ++l) {
        const LayerSpec& spec = pass_.layers[l].spec;
        weights_[l].packed = arena.take<E>(weights_[l].room(spec.in));
        if (!sums_dw && !(dy_is_ds_ && l + 1 == pass_.depth)) {
          ds_[l] = {arena.take<S>(pass_.batch * ld_ds(l)), ld_ds(l), 1};
        }
        lay_out_dw(l, arena);
        if (sums_dw && has_dw(l)) partial_[l] = arena.take<T>((threads - 1) * spec.out * spec.in);
        if (sums_dw && !ds_[l].data) {
          widest = std::max(widest, ld_ds(l));
          ++passing;
        }
      }
      buffers_ = passing > 1 ? 2 : 1;
      ring_size_ = plan_.chunk * widest;
      ring_ = arena.take<S>(threads * buffers_ * ring_size_);
      // What the threads share lies in what the first one keeps, where it is little; beside it there is less for x.
      constexpr int64_t OTHERS = THREAD_MEMORY / 32;
      if (arena.used() <= MOST_SHARED) most_scratch_ = static_cast<int64_t>(THREAD_MEMORY - arena.used()) - OTHERS;
      lay_out_scratch(arena, [&](auto most) {
        for (int l = lowest_; l < pass_.depth; ++l) {
          const LayerSpec& spec = pass_.layers[l].spec;
          if (has_product(l)) most([&](Arena& a) { ProductRoom(*this, l, plan_.chunk, spec.in, 0, a); });
          if (!has_dw(l)) continue;
          for (int64_t t = 0; t < threads; ++t) {
            const Share share = sums_dw ? Share{{0, spec.out}, {0, spec.in}} : share_of_dw(l, t);
            if (share.outs.size() == 0 || share.ins.size() == 0) continue;
            const int64_t rows = rows_of(t).size();
            // The rest of the rows may be packed in fewer blocks than a chunk, and so need more room.
            for (const int64_t m : {std::min(plan_.chunk, rows), rows % plan_.chunk}) {
              if (m > 0) most([&](Arena& a) { GradientRoom(*this, l, sums_dw ? m : pass_.batch, share, a); });
            }
          }
        }
      });
    };
    const Workspace workspace(memory, lay_out, [&] { return left_of_thread_memory(scratch_size_); });
    if (packs) {
      run(parallel, threads, [&](int64_t t) {
        for (int l = lowest_; l < pass_.depth; ++l) {
          if (weights_[l].panel) weights_[l].pack(numbers_, part(weights_[l].n, weights_[l].panel, t, threads));
        }
      });
    }
    run(parallel, threads, [&](int64_t t) { chain(t, memory); });
    if (!sums_dw) {
      run(parallel, threads, [&](int64_t t) {
        for (int l = lowest_; l < pass_.depth; ++l) tile_of_dw(l, t);
      });
    } else if (!is_alone()) {
      run(parallel, threads, [&](int64_t t) {
        for (int l = lowest_; l < pass_.depth; ++l) {
          if (!has_dw(l)) continue;
          const LayerSpec& spec = pass_.layers[l].spec;
          const Range rows = part(spec.out, 1, t, threads);
          for (int64_t u = 0; u + 1 < threads; ++u) {
            add(dw(l), partial_[l] + u * spec.out * spec.in, {rows.begin * spec.in, rows.end * spec.in});
          }
          descend(l, t);
        }
      });
    }
    for (int l = pass_.depth - 1; !is_alone() && l >= lowest_; --l) memory.end(l);
  }
  void begin_dw(int l, Memory& memory) const {
    if (has_dw(l) && !pass_.layers[l].descent) memory.begin(l);
  }
  void chain(int64_t t, Memory& memory) const {
    for (int l = lowest_; l < pass_.depth; ++l) clear_db(l, t, {0, pass_.layers[l].spec.out});
    const Range rows = rows_of(t);
    for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
      const int64_t m = std::min(plan_.chunk, rows.end - i);
      last_ds(t, {i, i + m}, {0, pass_.layers[pass_.depth - 1].spec.out});
      for (int l = pass_.depth - 1; l >= lowest_; --l) {
        const BackwardLayer<S>& layer = pass_.layers[l];
        const LayerSpec& spec = layer.spec;
        const auto own_gradient = [&] {
          if (split_ != GradientSplit::Rows || !layer.wants_dw) return;
          S* sum = t == 0 ? dw(l) : partial_[l] + (t - 1) * spec.out * spec.in;
          with_scratch(
              t, [&](Arena arena) { gradient(l, t, i, m, {{0, spec.out}, {0, spec.in}}, sum, i > rows.begin, arena); });
        };
        if (!is_alone()) own_gradient();
        if (has_product(l)) {
          if (is_alone() && l == 0) memory.begin_dx();
          with_scratch(t, [&](Arena arena) {
            product(l, t, i, m, {0, spec.in}, weights_[l], 0, ProductRoom(*this, l, plan_.chunk, spec.in, 0, arena));
          });
        }
        if (is_alone()) {
          begin_dw(l, memory);
          own_gradient();
          memory.end(l);
        }
      }
    }
  }
  void tile_of_dw(int l, int64_t t) const {
    const BackwardLayer<S>& layer = pass_.layers[l];
    if (!layer.wants_dw) return;
    if constexpr (DIRECT) {
      with_scratch(t, [&](Arena arena) { gradient(l, t, 0, pass_.batch, share_of_dw(l, t), dw(l), false, arena); });
    } else {
      gradient_in_blocks(l, t);
    }
  }

  // Layers: dw(l), then ds(l-1), which may take the place of x(l-1); so that nothing lives longer than it must.
  void by_layers(const Parallel& parallel, Memory& memory) {
    const int64_t threads = plan_.threads;
    const int last = pass_.depth - 1;
    std::optional<Workspace> rooms[2];
    const auto left = [&] { return left_of_thread_memory(scratch_size_); };
    const auto make_room = [&](int l) {
      if (ds_[l].data) return;
      rooms[l % 2].emplace(memory,
                           [&](Arena& arena) { ds_[l] = {arena.take<S>(pass_.batch * ld_ds(l)), ld_ds(l), 1}; });
    };
    make_room(last);
    const auto top = [&](int64_t t) {
      const Range columns = part(pass_.layers[last].spec.out, 16, t, threads);
      clear_db(last, 0, columns);
      last_ds(0, {0, pass_.batch}, columns);
    };
    if (!dy_is_ds_) run(parallel, threads, top);
    for (int l = last; l >= lowest_; --l) {
      const BackwardLayer<S>& layer = pass_.layers[l];
      const bool sums_db = dy_is_ds_ && l == last, own = owns_columns(l);
      if (has_dw(l) && !layer.descent) memory.begin(l);
      const Workspace dw_of_layer(memory, [&](Arena& arena) { lay_out_dw(l, arena); });
      if (l > 0 && has_product(l)) make_room(l - 1);
      if (own && l > 0) {
        const Workspace workspace(memory, [&](Arena& arena) { lay_out_layer(arena, l, Part::Both); }, left);
        run(parallel, threads, [&](int64_t t) {
          if (sums_db) top(t);
          if (!descends(l) || !has_product(l)) tile_of_dw(l, t);
          if (has_product(l)) columns_of_product(l, t);
        });
      } else {
        {
          const Workspace workspace(memory, [&](Arena& arena) { lay_out_layer(arena, l, Part::Gradient); }, left);
          run(parallel, threads, [&](int64_t t) {
            if (sums_db) top(t);
            tile_of_dw(l, t);
          });
        }
        if (has_product(l)) {
          if (l == 0) memory.begin_dx();
          const Workspace workspace(memory, [&](Arena& arena) { lay_out_layer(arena, l, Part::Product); }, left);
          if (own) {
            run(parallel, threads, [&](int64_t t) { columns_of_product(l, t); });
          } else {
            rows_of_products(l, parallel);
          }
        }
        if (buffers_dw(l)) run(parallel, threads, [&](int64_t t) { descend(l, t); });
        dw_[l] = nullptr;
      }
      memory.end(l);
      rooms[l % 2].reset();
    }
  }
  enum class Part { Gradient, Product, Both };
  void lay_out_layer(Arena& arena, int l, Part what) {
    if constexpr (DIRECT) lay_out_products(arena, l, what);
  }
  void lay_out_products(Arena& arena, int l, Part what) {
    const LayerSpec& spec = pass_.layers[l].spec;
    const bool own = owns_columns(l);
    if (!own && what == Part::Product) {
      weights_[l] = {numbers_, pass_.layers[l].w, plan_.chunk, spec.out, spec.in};
      weights_[l].packed = arena.take<E>(weights_[l].room(spec.in));
    }
    lay_out_scratch(arena, [&](auto most) {
      for (int64_t t = 0; t < plan_.threads; ++t) {
        const Share share = share_of_dw(l, t);
        const bool by_tile = what == Part::Gradient || !descends(l) || !has_product(l);
        if (what != Part::Product && by_tile && has_dw(l) && share.outs.size() && share.ins.size()) {
          most([&](Arena& a) { GradientRoom(*this, l, pass_.batch, share, a); });
        }
        if (what == Part::Gradient || !has_product(l)) continue;
        if (own) {
          const Columns at_once = columns_at_once(l, columns_of(l, t));
          most([&](Arena& a) {
            ProductRoom(*this, l, at_once.rows, at_once.columns, at_once.packed, a);
            if (descends(l)) GradientRoom(*this, l, pass_.batch, {{0, spec.out}, {0, at_once.columns}}, a);
          });
        } else {
          most([&](Arena& a) { ProductRoom(*this, l, plan_.chunk, spec.in, 0, a); });
        }
      }
    });
  }

  // A thread's columns of a product: as many at once, and as much of the sum, as there is room to pack.
  struct Columns {
    int64_t rows, columns, depth, packed;
  };
  Columns columns_at_once(int l, Range share) const {
    const LayerSpec& spec = pass_.layers[l].spec;
    const int64_t rows = needs_sums(l) ? plan_.chunk : pass_.batch;
    const Weights all = columns_of_weight(l, rows, {0, spec.out}, {0, share.size()});
    if (all.panel == 0) return {rows, share.size(), spec.out, 0};
    // ds(l-1) in the place of x(l-1) leaves room for it, and so does a dw that nobody wants; beside dx there is little.
    // Where dw is made beside the packed columns, they share the room with the sums of as many.
    const bool roomy = l > 0 || !has_dw(l);
    const int64_t depth = roomy ? spec.out : std::min(spec.out, packed_depth());
    const Weights w = columns_of_weight(l, rows, {0, depth}, {0, share.size()});
    const int64_t input = pass_.batch * spec.in * static_cast<int64_t>(sizeof(S));
    int64_t bytes = THREAD_MEMORY;
    if (roomy) {
      bytes = std::min((input / 2 + thresholds().packed_bytes) / plan_.threads, thresholds().product_bytes);
    }
    // Beside as much of x and of the sums; of ds too, where that is packed.
    if (descends(l)) bytes = ds_is_near(l) ? plan_.block_bytes : plan_.block_bytes * 2 / 3;
    const int64_t panels = bytes / (w.room(w.panel) * static_cast<int64_t>(sizeof(E)));
    const int64_t columns = std::min(share.size(), std::max<int64_t>(1, panels) * w.panel);
    return {rows, columns, depth, w.room(columns)};
  }
  // Some rows and columns of w(l): packed where they are about to be updated.
  Weights columns_of_weight(int l, int64_t m, Range rows, Range columns) const {
    Matrix<const S> w = rows_from(pass_.layers[l].w, rows.begin);
    w.data += columns.begin * w.cs;
    Weights some(numbers_, descends(l) ? Matrix<const S>{} : w, m, rows.size(), columns.size());
    some.b = w;
    return some;
  }
  void columns_of_product(int l, int64_t t) const {
    const Range share = columns_of(l, t);
    if (share.size() == 0) return;
    if (l > 0) clear_db(l - 1, 0, share);
    if constexpr (DIRECT) {
      blocks_of_columns(l, t, share);
    } else {
      product_in_blocks(l, 0, {0, pass_.batch}, share);
    }
  }
  void blocks_of_columns(int l, int64_t t, Range share) const {
    const Columns at_once = columns_at_once(l, share);
    with_scratch(t, [&](Arena arena) {
      const ProductRoom room(*this, l, at_once.rows, at_once.columns, at_once.packed, arena);
      const int64_t out = pass_.layers[l].spec.out;
      for (int64_t j = share.begin; j < share.end; j += at_once.columns) {
        const Range columns{j, std::min(j + at_once.columns, share.end)};
        for (int64_t p = 0; p < out; p += at_once.depth) {
          Weights some = columns_of_weight(l, at_once.rows, {p, std::min(p + at_once.depth, out)}, columns);
          some.packed = room.packed;
          some.pack(numbers_, {0, columns.size()});
          if (descends(l)) gradient(l, t, 0, pass_.batch, {{0, out}, columns}, nullptr, false, arena);
          for (int64_t i = 0; i < pass_.batch; i += at_once.rows) {
            product(l, 0, i, std::min(at_once.rows, pass_.batch - i), columns, some, p, room);
          }
        }
      }
    });
  }
  // The same by rows.
  void rows_of_products(int l, const Parallel& parallel) const {
    const int64_t threads = plan_.threads, in = pass_.layers[l].spec.in;
    const Weights& w = weights_[l];
    if (w.panel) run(parallel, threads, [&](int64_t t) { w.pack(numbers_, part(in, w.panel, t, threads)); });
    run(parallel, threads, [&](int64_t t) {
      if (l > 0) clear_db(l - 1, t, {0, in});
      const Range rows = rows_of(t);
      if constexpr (DIRECT) {
        with_scratch(t, [&](Arena arena) {
          const ProductRoom room(*this, l, plan_.chunk, in, 0, arena);
          for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
            product(l, t, i, std::min(plan_.chunk, rows.end - i), {0, in}, w, 0, room);
          }
        });
      } else {
        product_in_blocks(l, t, rows, {0, in});
      }
    });
  }

  const Numbers<S, E> numbers_;
  const Plan& plan_;
  const Backward<S>& pass_;
  const GradientSplit split_;
  int lowest_;     // the lowest layer whose ds is needed
  bool dy_is_ds_;  // ds(L) is dy where it lies
  std::vector<Weights> weights_;
  std::vector<Matrix<S>> ds_;  // null: a chunk at a time, in ring_
  std::vector<S*> dw_;         // from which w is updated after the whole of it was read
  std::vector<T*> partial_, db_;
  S* ring_ = nullptr;
  int64_t buffers_ = 1, ring_size_ = 0;  // of each thread
  char* scratch_ = nullptr;
  size_t scratch_size_ = 0;
  int64_t most_scratch_ = THREAD_MEMORY;  // of x and ds that are packed for dw
};

template <class S, class K>
void backward_with(const K& kernels, const Plan& plan, const Backward<S>& pass, const Parallel& parallel,
                   Memory& memory) {
  if (pass.batch > 0) {
    with_numbers(kernels, [&](const auto& numbers) { BackwardRun(numbers, plan, pass)(parallel, memory); });
    return;
  }
  if (pass.wants_dx) memory.begin_dx();
  for (int l = 0; l < pass.depth; ++l) {
    const BackwardLayer<S>& layer = pass.layers[l];
    if (layer.wants_dw) {
      memory.begin(l);
      std::fill(layer.dw, layer.dw + layer.spec.out * layer.spec.in, S{});
    }
    if (layer.db) std::fill(layer.db, layer.db + layer.spec.out, S{});
  }
}

}  // namespace

template <class T>
void backward(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass, const Parallel& parallel,
              Memory& memory) {
  backward_with(kernels, plan, pass, parallel, memory);
}
template <class S>
void backward(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass, const Parallel& parallel,
              Memory& memory) {
  backward_with(kernels, plan, pass, parallel, memory);
}

#define PYPERC_INSTANTIATE(KERNELS, S) \
  template void backward<S>(const KERNELS<S>&, const Plan&, const Backward<S>&, const Parallel&, Memory&);
PYPERC_INSTANTIATE(Kernels, float)
PYPERC_INSTANTIATE(Kernels, double)
PYPERC_INSTANTIATE(HalfKernels, BFloat16)
PYPERC_INSTANTIATE(HalfKernels, Half)

}  // namespace pyperc
