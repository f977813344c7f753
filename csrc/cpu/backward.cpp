// The backward pass of the whole network: the two ways through its layers, and their workspace.
#include <algorithm>
#include <optional>

#include "gradients.h"

namespace pyperc {

namespace {

// A thread's rows go through all layers, chunk by chunk, and add to a dw of its own.
template <class S, class E>
class ByRows {
  using T = Sum<E>;
  using Weights = Operand<S, E>;
  using GradientRoom = typename Gradients<S, E>::GradientRoom;

 public:
  explicit ByRows(Gradients<S, E>& gradients)
      : g_(gradients), plan_(g_.plan), pass_(g_.pass), weights_(pass_.depth), partial_(pass_.depth) {}

  void operator()(const Parallel& parallel, Memory& memory) {
    const int64_t threads = plan_.threads;
    if (!g_.is_alone()) {
      for (int l = pass_.depth - 1; l >= g_.lowest; --l) g_.begin_dw(l, memory);
      if (pass_.wants_dx) memory.begin_dx();
    }
    for (int l = g_.lowest; l < pass_.depth; ++l) {
      const LayerSpec& spec = pass_.layers[l].spec;
      if (g_.has_product(l)) weights_[l] = {g_.numbers, pass_.layers[l].w, plan_.chunk, spec.out, spec.in};
    }
    const Workspace workspace(memory, [&](Arena& arena) { lay_out(arena); }, [&] { return g_.scratch.left(); });
    const bool packs = std::any_of(weights_.begin(), weights_.end(), [](const Weights& w) { return w.panel > 0; });
    if (packs) {
      run(parallel, threads, [&](int64_t t) {
        for (int l = g_.lowest; l < pass_.depth; ++l) {
          if (weights_[l].panel) weights_[l].pack(g_.numbers, part(weights_[l].n, weights_[l].panel, t, threads));
        }
      });
    }
    run(parallel, threads, [&](int64_t t) { chain(t, memory); });
    if (!g_.is_alone()) {
      run(parallel, threads, [&](int64_t t) {
        for (int l = g_.lowest; l < pass_.depth; ++l) {
          if (!g_.has_dw(l)) continue;
          const LayerSpec& spec = pass_.layers[l].spec;
          const Range rows = part(spec.out, 1, t, threads);
          for (int64_t u = 1; u < threads; ++u) {
            g_.add(dw(l, 0), dw(l, u), {rows.begin * spec.in, rows.end * spec.in});
          }
          g_.descend(l, t);
        }
      });
      for (int l = pass_.depth - 1; l >= g_.lowest; --l) memory.end(l);
    }
  }

 private:
  void lay_out(Arena& arena) {
    for (int l = g_.lowest; l < pass_.depth; ++l) {
      const LayerSpec& spec = pass_.layers[l].spec;
      weights_[l].packed = arena.take<E>(weights_[l].room(spec.in));
      g_.lay_out_dw(l, arena);
      if (g_.has_dw(l)) partial_[l] = arena.take<T>((plan_.threads - 1) * spec.out * spec.in);
    }
    g_.lay_out_ring(arena);
    // What the threads share lies in what the first one keeps, where it is little.
    g_.lay_out_scratch(arena, arena.used() <= MOST_SHARED ? arena.used() : 0, [&](auto most) {
      for (int l = g_.lowest; l < pass_.depth; ++l) {
        if (g_.has_product(l)) most([&](Arena& a) { room_of_sums(l, a); });
        if (!g_.has_dw(l)) continue;
        for (int64_t t = 0; t < plan_.threads; ++t) {
          const int64_t rows = g_.rows_of(t).size();
          // The rest of the rows may be packed in fewer blocks than a chunk, and so need more room.
          for (const int64_t m : {std::min(plan_.chunk, rows), rows % plan_.chunk}) {
            if (m > 0) most([&](Arena& a) { GradientRoom(g_, l, m, g_.whole(l), a); });
          }
        }
      }
    });
  }
  Sums<E> room_of_sums(int l, Arena& arena) const {
    return g_.room_of_sums(l, plan_.chunk, pass_.layers[l].spec.in, arena);
  }
  // Of thread t's rows.
  T* dw(int l, int64_t t) const {
    return t == 0 ? g_.dw(l) : partial_[l] + (t - 1) * pass_.layers[l].spec.out * pass_.layers[l].spec.in;
  }
  void chain(int64_t t, Memory& memory) const {
    for (int l = g_.lowest; l < pass_.depth; ++l) g_.clear_db(l, t, {0, pass_.layers[l].spec.out});
    const Range rows = g_.rows_of(t);
    for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
      const int64_t m = std::min(plan_.chunk, rows.end - i);
      g_.last_ds(t, {i, i + m}, {0, pass_.layers[pass_.depth - 1].spec.out});
      for (int l = pass_.depth - 1; l >= g_.lowest; --l) {
        const auto own_gradient = [&] {
          if (g_.has_dw(l)) g_.gradient(l, t, i, m, g_.whole(l), dw(l, t), i > rows.begin, g_.scratch.of(t));
        };
        if (!g_.is_alone()) own_gradient();
        if (g_.has_product(l)) {
          if (g_.is_alone() && l == 0) memory.begin_dx();
          Arena arena = g_.scratch.of(t);
          g_.product(l, t, i, m, {0, pass_.layers[l].spec.in}, weights_[l], 0, room_of_sums(l, arena));
        }
        if (g_.is_alone()) {
          g_.begin_dw(l, memory);
          own_gradient();
          memory.end(l);
        }
      }
    }
  }

  Gradients<S, E>& g_;
  const Plan& plan_;
  const Backward<S>& pass_;
  std::vector<Weights> weights_;
  std::vector<T*> partial_;  // dw of the other threads' rows
};

// Layer by layer: dw(l), then ds(l-1), which may take the place of x(l-1); so that nothing lives longer than it must.
template <class S, class E>
class ByLayers {
  using Weights = Operand<S, E>;
  using Share = typename Gradients<S, E>::Share;
  using GradientRoom = typename Gradients<S, E>::GradientRoom;
  static constexpr bool DIRECT = Gradients<S, E>::DIRECT;

 public:
  explicit ByLayers(Gradients<S, E>& gradients) : g_(gradients), plan_(g_.plan), pass_(g_.pass) {}

  void operator()(const Parallel& parallel, Memory& memory) {
    const int64_t threads = plan_.threads;
    const int last = pass_.depth - 1;
    std::optional<Workspace> rooms[2];
    const auto left = [&] { return g_.scratch.left(); };
    const auto make_room = [&](int l) {
      if (!g_.keeps_ds(l)) rooms[l % 2].emplace(memory, [&](Arena& arena) { g_.lay_out_ds(l, arena); });
    };
    make_room(last);
    const auto top = [&](int64_t t) {
      const Range columns = part(pass_.layers[last].spec.out, 16, t, threads);
      g_.clear_db(last, 0, columns);
      g_.last_ds(0, {0, pass_.batch}, columns);
    };
    if (!g_.dy_is_ds) run(parallel, threads, top);
    for (int l = last; l >= g_.lowest; --l) {
      const bool sums_db = g_.dy_is_ds && l == last, own = g_.owns_columns(l);
      g_.begin_dw(l, memory);
      const Workspace dw_of_layer(memory, [&](Arena& arena) { g_.lay_out_dw(l, arena); });
      if (l > 0 && g_.has_product(l)) make_room(l - 1);
      if (own && l > 0) {
        const Workspace workspace(memory, [&](Arena& arena) { lay_out_layer(arena, l, Phase::Both); }, left);
        run(parallel, threads, [&](int64_t t) {
          if (sums_db) top(t);
          if (makes_dw_by_share(l)) g_.make_dw(l, t);
          if (g_.has_product(l)) columns_of_product(l, t);
        });
      } else {
        {
          const Workspace workspace(memory, [&](Arena& arena) { lay_out_layer(arena, l, Phase::Gradient); }, left);
          run(parallel, threads, [&](int64_t t) {
            if (sums_db) top(t);
            g_.make_dw(l, t);
          });
        }
        if (g_.has_product(l)) {
          if (l == 0) memory.begin_dx();
          const Workspace workspace(memory, [&](Arena& arena) { lay_out_layer(arena, l, Phase::Product); }, left);
          if (own) {
            run(parallel, threads, [&](int64_t t) { columns_of_product(l, t); });
          } else {
            rows_of_products(l, parallel);
          }
        }
        if (g_.buffers_dw(l)) run(parallel, threads, [&](int64_t t) { g_.descend(l, t); });
      }
      memory.end(l);
      rooms[l % 2].reset();
    }
  }

 private:
  enum class Phase { Gradient, Product, Both };
  // Whether dw(l) is made before the product, and not while a thread has the columns of w that it packed for that.
  bool makes_dw_by_share(int l) const { return !g_.descends(l) || !g_.has_product(l); }
  void lay_out_layer(Arena& arena, int l, Phase what) {
    if constexpr (DIRECT) lay_out_products(arena, l, what);
  }
  void lay_out_products(Arena& arena, int l, Phase what) {
    const LayerSpec& spec = pass_.layers[l].spec;
    const bool own = g_.owns_columns(l), by_share = what != Phase::Product && makes_dw_by_share(l);
    if (!own && what == Phase::Product) {
      weights_ = {g_.numbers, pass_.layers[l].w, plan_.chunk, spec.out, spec.in};
      weights_.packed = arena.take<E>(weights_.room(spec.in));
    }
    g_.lay_out_scratch(arena, 0, [&](auto most) {
      for (int64_t t = 0; t < plan_.threads; ++t) {
        const Share share = g_.share_of_dw(l, t);
        if (by_share && g_.has_dw(l) && share.outs.size() && share.ins.size()) {
          most([&](Arena& a) { GradientRoom(g_, l, pass_.batch, share, a); });
        }
        if (what == Phase::Gradient || !g_.has_product(l)) continue;
        if (own) {
          const Columns at_once = columns_at_once(l, g_.columns_of(l, t));
          most([&](Arena& a) {
            a.take<E>(at_once.packed);
            g_.room_of_sums(l, at_once.rows, at_once.columns, a);
            if (g_.descends(l)) GradientRoom(g_, l, pass_.batch, {{0, spec.out}, {0, at_once.columns}}, a);
          });
        } else {
          most([&](Arena& a) { g_.room_of_sums(l, plan_.chunk, spec.in, a); });
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
    const int64_t rows = g_.needs_sums(l) ? plan_.chunk : pass_.batch;
    const Weights all = columns_of_weight(l, rows, {0, spec.out}, {0, share.size()});
    if (all.panel == 0) return {rows, share.size(), spec.out, 0};
    // ds(l-1) in the place of x(l-1) leaves room for it, and so does a dw that nobody wants; beside dx there is little.
    // Where dw is made beside the packed columns, they share the room with the sums of as many.
    const bool roomy = l > 0 || !g_.has_dw(l);
    const int64_t depth = roomy ? spec.out : std::min(spec.out, g_.packed_depth());
    const Weights w = columns_of_weight(l, rows, {0, depth}, {0, share.size()});
    const int64_t input = pass_.batch * spec.in * static_cast<int64_t>(sizeof(S));
    int64_t bytes = THREAD_MEMORY;
    if (roomy) {
      bytes = std::min((input / 2 + thresholds().packed_bytes) / plan_.threads, thresholds().product_bytes);
    }
    // Beside as much of x and of the sums; of ds too, where that is packed.
    if (g_.descends(l)) bytes = g_.ds_is_near(l) ? plan_.block_bytes : plan_.block_bytes * 2 / 3;
    const int64_t columns = w.fitting(bytes, {0, share.size()});
    return {rows, columns, depth, w.room(columns)};
  }
  // Some rows and columns of w(l): packed where they are about to be updated.
  Weights columns_of_weight(int l, int64_t m, Range rows, Range columns) const {
    Matrix<const S> w = rows_from(pass_.layers[l].w, rows.begin);
    w.data += columns.begin * w.cs;
    Weights some(g_.numbers, g_.descends(l) ? Matrix<const S>{} : w, m, rows.size(), columns.size());
    some.b = w;
    return some;
  }
  void columns_of_product(int l, int64_t t) const {
    const Range share = g_.columns_of(l, t);
    if (share.size() == 0) return;
    if (l > 0) g_.clear_db(l - 1, 0, share);
    if constexpr (DIRECT) {
      blocks_of_columns(l, t, share);
    } else {
      g_.product_in_blocks(l, 0, {0, pass_.batch}, share);
    }
  }
  void blocks_of_columns(int l, int64_t t, Range share) const {
    const Columns at_once = columns_at_once(l, share);
    Arena arena = g_.scratch.of(t);
    E* const packed = arena.take<E>(at_once.packed);
    const Sums<E> sums = g_.room_of_sums(l, at_once.rows, at_once.columns, arena);
    const int64_t out = pass_.layers[l].spec.out;
    for (int64_t j = share.begin; j < share.end; j += at_once.columns) {
      const Range columns{j, std::min(j + at_once.columns, share.end)};
      for (int64_t p = 0; p < out; p += at_once.depth) {
        Weights some = columns_of_weight(l, at_once.rows, {p, std::min(p + at_once.depth, out)}, columns);
        some.packed = packed;
        some.pack(g_.numbers, {0, columns.size()});
        if (g_.descends(l)) g_.gradient(l, t, 0, pass_.batch, {{0, out}, columns}, nullptr, false, arena);
        for (int64_t i = 0; i < pass_.batch; i += at_once.rows) {
          g_.product(l, 0, i, std::min(at_once.rows, pass_.batch - i), columns, some, p, sums);
        }
      }
    }
  }
  // The same by rows.
  void rows_of_products(int l, const Parallel& parallel) const {
    const int64_t threads = plan_.threads, in = pass_.layers[l].spec.in;
    const int64_t panel = weights_.panel;
    if (panel) run(parallel, threads, [&](int64_t t) { weights_.pack(g_.numbers, part(in, panel, t, threads)); });
    run(parallel, threads, [&](int64_t t) {
      if (l > 0) g_.clear_db(l - 1, t, {0, in});
      const Range rows = g_.rows_of(t);
      if constexpr (DIRECT) {
        Arena arena = g_.scratch.of(t);
        const Sums<E> sums = g_.room_of_sums(l, plan_.chunk, in, arena);
        for (int64_t i = rows.begin; i < rows.end; i += plan_.chunk) {
          g_.product(l, t, i, std::min(plan_.chunk, rows.end - i), {0, in}, weights_, 0, sums);
        }
      } else {
        g_.product_in_blocks(l, t, rows, {0, in});
      }
    });
  }

  Gradients<S, E>& g_;
  const Plan& plan_;
  const Backward<S>& pass_;
  Weights weights_;  // of one layer, where its product goes by rows
};

template <class S, class K>
void backward_with(const K& kernels, const Plan& plan, const Backward<S>& pass, const Parallel& parallel,
                   Memory& memory) {
  if (pass.batch > 0) {
    with_numbers(kernels, [&](const auto& numbers) {
      Gradients gradients(numbers, plan, pass);
      if (gradients.lowest == pass.depth) return;
      const Workspace sums(memory, [&](Arena& arena) { gradients.lay_out_db(arena); });
      if (gradients.split == GradientSplit::Layers) {
        ByLayers{gradients}(parallel, memory);
      } else if constexpr (gradients.DIRECT) {
        ByRows{gradients}(parallel, memory);
      }
      gradients.finish_db();
    });
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
