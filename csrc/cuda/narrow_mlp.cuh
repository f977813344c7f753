// The kernels of the narrow network and their launchers, for the one dtype that each narrow_mlp_*.cu names.
//
// A warp has 16 or 32 rows and takes them through all layers: its part of a tile in shared memory is nobody else's, and
// holds what is between two layers; a layer's activation is applied to its sums in registers. The weights of all layers
// stay in shared memory where it holds them, and else come by turns into two places, the next one's while this one's
// are used. A block goes over every n-th tile of rows.
//
// Backward: for each layer the block's warps share out dw = ds^T x over the rows of the tile and add to sums of their
// own, which lie in the second-level cache; the sums of the blocks are added in their order by a second kernel.
#pragma once

#include <algorithm>

#include "epilogue.cuh"
#include "launch.cuh"
#include "narrow_mlp.h"
#include "operand.cuh"

namespace pyperc::cuda {

enum class Pass { Forward, Backward };

// A row of the tile takes WIDTH sizeof(T) bytes, and backward has two tiles: where they are long, a warp has 16 rows,
// and one block fills a multiprocessor.
template <class T, int WIDTH_, Pass PASS>
struct NarrowShape {
  static constexpr int WIDTH = WIDTH_, BYTES = WIDTH * sizeof(T), TILES = PASS == Pass::Forward ? 1 : 2;
  static constexpr int WARPS = BYTES > 256 ? 4 : 8, THREADS = WARPS * WARP, BLOCKS = BYTES > 128 ? 1 : 2;
  static constexpr int HEIGHT = BYTES * TILES > 256 ? 1 : 2;  // matrix tiles of 16 rows
  static constexpr int ROWS = 16 * HEIGHT, BM = WARPS * ROWS, STEP = 32 / sizeof(T), STEPS = WIDTH / STEP;
  // How the warps share a layer's dw, in rows, columns and terms of its sums, and the parts of a column of db.
  static constexpr int WM = 32, WARPS_M = WIDTH / WM, WN = std::max(16, WIDTH* WARPS_M / WARPS);
  static constexpr int WARPS_N = WIDTH / WN, WARPS_K = WARPS / (WARPS_M * WARPS_N);
  static constexpr int PARTS = THREADS / WIDTH, SUMS = WIDTH * WIDTH, LAYER_SUMS = WARPS_K * SUMS + PARTS * WIDTH;
  static constexpr size_t WEIGHT = SUMS * sizeof(T) + WIDTH * sizeof(float), TILE = BM * WIDTH * sizeof(T);
};

struct Narrow {
  int64_t tiles;  // of rows
  int places;     // for weights: one for each layer, or two
};

// Whether rows that lie ld apart can be read and written in whole pieces of 16 bytes.
template <class T>
PYPERC_DEVICE bool in_pieces(const T* data, int64_t ld) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(ld) * sizeof(T)) % 16 == 0;
}

// The weights and biases of the layers in shared memory.
template <class S, class T>
struct Weights {
  T* data;
  float* biases;
  int places, depth, turn = 0;

  PYPERC_DEVICE Weights(std::byte* memory, int places_, int depth_) : places(places_), depth(depth_) {
    data = reinterpret_cast<T*>(memory);
    biases = reinterpret_cast<float*>(data + places * S::WIDTH * S::WIDTH);
  }
  PYPERC_DEVICE bool resident() const { return places == depth; }
  PYPERC_DEVICE int place(int l) const { return resident() ? l : turn % 2; }
  PYPERC_DEVICE T* weight(int l) const { return data + place(l) * S::WIDTH * S::WIDTH; }
  PYPERC_DEVICE const float* bias(int l) const { return biases + place(l) * S::WIDTH; }

  PYPERC_DEVICE void bring(const NarrowLayer<T>& layer, int to) const {
    const Tile<T, S::WIDTH, S::WIDTH> w{data + to * S::WIDTH * S::WIDTH};
    if (in_pieces(layer.w, layer.ld_w)) {
      constexpr int ROWS = 32;  // at once, for the registers' sake
      PYPERC_NO_UNROLL
      for (int i = 0; i < S::WIDTH; i += ROWS) {
        Tile<T, ROWS, S::WIDTH>{w.at(i, 0)}.template copy<S::THREADS>(layer.w + i * layer.ld_w, layer.ld_w,
                                                                      layer.out - i, layer.in, thread());
      }
    } else {
      gather<S::THREADS>(w, layer.w, layer.ld_w, 1, layer.out, layer.in);
    }
    for (int i = thread(); i < S::WIDTH; i += S::THREADS) {
      biases[to * S::WIDTH + i] = layer.b && i < layer.out ? widen(layer.b[i]) : 0.0f;
    }
  }
  PYPERC_DEVICE void begin(const NarrowLayer<T>* layers, int first) const {
    if (resident()) {
      for (int l = 0; l < depth; ++l) bring(layers[l], l);
    } else {
      bring(layers[first], 0);
    }
    copy_commit();
    copy_wait<0>();
    sync();
  }
  // Between two barriers of a layer, while nobody reads the other place.
  PYPERC_DEVICE void bring_next(const NarrowLayer<T>& next) const {
    if (!resident()) bring(next, (turn + 1) % 2);
    copy_commit();
  }
};

// The rows of a warp in a tile in shared memory.
template <class S, class T>
struct Rows {
  static constexpr int SIZE = Vector<T>::SIZE;
  using Sums = FragmentC[S::HEIGHT][2];  // of all rows and 16 columns
  Tile<T, S::BM, S::WIDTH> tile;
  int first, height;  // of the tile; how many exist
  int64_t row;        // of the batch

  PYPERC_DEVICE Rows(T* data, int64_t t, int64_t batch) : tile{data} {
    first = warp() * S::ROWS;
    row = t * S::BM + first;
    height = batch > row ? limited(batch - row, S::ROWS) : 0;
  }

  // f(row of the warp, piece, how many of its elements exist) for rows of `width`, in whole matrix steps.
  template <class F>
  PYPERC_DEVICE void each_piece(int width, F f) const {
    const int count = (width + S::STEP - 1) / S::STEP * (S::STEP / SIZE);
    int log2 = 1;
    while (1 << log2 < count) ++log2;
    const int piece = lane() & ((1 << log2) - 1), left = width - piece * SIZE;
    if (piece >= count) return;
    PYPERC_NO_UNROLL
    for (int i = lane() >> log2; i < S::ROWS; i += WARP >> log2) {
      f(i, piece, i < height && left > 0 ? (left < SIZE ? left : SIZE) : 0);
    }
  }

  // Starts the copy of [batch, width] rows; zero beyond.
  PYPERC_DEVICE void bring(const T* from, int64_t ld, int width) const {
    const bool whole = in_pieces(from, ld);
    each_piece(width, [&](int i, int piece, int count) {
      const T* source = count ? from + (row + i) * ld + piece * SIZE : from;
      T* to = tile.at(first + i, piece);
      if (whole) {
        copy_async<16>(to, source, count * static_cast<int>(sizeof(T)));
      } else {
        PYPERC_UNROLL
        for (int e = 0; e < SIZE; ++e) to[e] = e < count ? source[e] : T{};
      }
    });
    copy_commit();
  }
  PYPERC_DEVICE void write(T* to, int64_t ld, int width) const {
    const bool whole = in_pieces(to, ld);
    each_piece(width, [&](int i, int piece, int count) {
      Wide<T> x[SIZE];
      read_row(tile.at(first + i, piece), SIZE, true, x);
      write_row(to + (row + i) * ld + piece * SIZE, count, whole, x);
    });
  }
  // Elements x become f(x, those of `other`).
  template <class F>
  PYPERC_DEVICE void change(int width, const Rows& other, F f) const {
    each_piece(width, [&](int i, int piece, int) {
      T* at = tile.at(first + i, piece);
      Wide<T> x[SIZE], y[SIZE];
      read_row(at, SIZE, true, x);
      read_row(other.tile.at(first + i, piece), SIZE, true, y);
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) x[e] = f(Value<Wide<T>>(x[e]), Value<Wide<T>>(y[e])).v;
      write_row(at, SIZE, true, x);
    });
  }

  // f(row of the warp, column of the first sum, its pair of sums) for all of a thread's.
  template <class F>
  static PYPERC_DEVICE void each_pair(Sums& c, int n, F f) {
    PYPERC_UNROLL
    for (int i = 0; i < S::HEIGHT; ++i) {
      PYPERC_UNROLL
      for (int j = 0; j < 2; ++j) {
        PYPERC_UNROLL
        for (int half = 0; half < 2; ++half) {
          f(i * 16 + half * 8 + lane() / 4, n + j * 8 + lane() % 4 * 2, &c[i][j].r[2 * half]);
        }
      }
    }
  }
  // x w^T + bias (ALONG_K) or ds w, as finish(sums, first column) leaves them, in the place of x or ds.
  template <bool ALONG_K, class F>
  PYPERC_DEVICE void multiply(T* weight, const float* bias, int in, int out, F finish) const {
    const OperandTile<T, S::BM, S::WIDTH, true> a(tile.data);
    const OperandTile<T, S::WIDTH, S::WIDTH, ALONG_K> b(weight);
    FragmentA x[S::HEIGHT][S::STEPS] = {};
    PYPERC_UNROLL
    for (int k = 0; k < S::STEPS; ++k) {
      if (k * S::STEP >= in) break;
      PYPERC_UNROLL
      for (int i = 0; i < S::HEIGHT; ++i) x[i][k] = a.as_a(first + i * 16, k);
    }
    warp_sync();  // all have read the rows
    // Where no step asks whether there is one, the loads go ahead of the products.
    const auto add = [&](auto all_steps, Sums& c, int n) {
      PYPERC_UNROLL
      for (int k = 0; k < S::STEPS; ++k) {
        if (!decltype(all_steps)::value && k * S::STEP >= in) break;
        FragmentB w[2];
        b.as_b(n, k, w);
        PYPERC_UNROLL
        for (int i = 0; i < S::HEIGHT; ++i) {
          mma<T>(c[i][0], x[i][k], w[0]);
          mma<T>(c[i][1], x[i][k], w[1]);
        }
      }
    };
    PYPERC_NO_UNROLL
    for (int n = 0; n < out; n += 16) {
      Sums c = {};
      if (bias) {
        each_pair(c, n, [&](int, int column, float* pair) {
          pair[0] = bias[column];
          pair[1] = bias[column + 1];
        });
      }
      if (in > S::WIDTH - S::STEP) {
        add(std::true_type(), c, n);
      } else {
        add(std::false_type(), c, n);
      }
      finish(c, n);
      each_pair(c, n, [&](int i, int column, const float* pair) {
        store_pair(tile.element(first + i, column), pair[0], pair[1]);
      });
    }
    warp_sync();
  }
  // Sums as they are, into [batch, width] rows.
  PYPERC_DEVICE void keep(Sums& c, int n, T* to, int64_t ld, int width) const {
    const bool aligned = in_pieces(to, ld);
    each_pair(c, n, [&](int i, int column, const float* pair) {
      if (i >= height) return;
      T* at = to + (row + i) * ld + column;
      if (aligned && column + 1 < width) {
        store_pair(at, pair[0], pair[1]);
      } else {
        if (column < width) at[0] = narrow<T>(pair[0]);
        if (column + 1 < width) at[1] = narrow<T>(pair[1]);
      }
    });
  }
};

// f(the activation's struct)
template <class F>
PYPERC_DEVICE void with_activation(Activation activation, F f) {
  switch (activation) {
#define X(A) \
  case Activation::A: f(A{}); break;
    PYPERC_ACTIVATIONS(X)
#undef X
  }
}

PYPERC_DEVICE Saved saved_by(Activation activation) {
  Saved saved{};
  with_activation(activation, [&](auto a) { saved = decltype(a)::saved; });
  return saved;
}

template <class T, class S>
PYPERC_KERNEL(S::THREADS, S::BLOCKS)
narrow_forward_kernel(PYPERC_PARAMETER NarrowForward<T> g, PYPERC_PARAMETER Narrow p) {
  Weights<S, T> weights(shared_memory(), p.places, g.depth);
  auto* data = reinterpret_cast<T*>(shared_memory() + p.places * S::WEIGHT);
  weights.begin(g.layers, 0);
  for (int64_t t = block(); t < p.tiles; t += blocks()) {
    const Rows<S, T> rows(data, t, g.batch);
    rows.bring(g.x, g.ld_x, g.layers[0].in);
    PYPERC_NO_UNROLL
    for (int l = 0; l < g.depth; ++l) {
      const NarrowLayer<T>& layer = g.layers[l];
      copy_wait<0>();
      if (weights.resident()) {
        warp_sync();
      } else {
        sync();  // this layer's weights are there for all, and nobody reads the last one's any more
        weights.bring_next(g.layers[l + 1 < g.depth ? l + 1 : 0]);
      }
      const bool keeps_s = layer.kept && saved_by(layer.activation) == Saved::Summation;
      rows.template multiply<true>(weights.weight(l), weights.bias(l), layer.in, layer.out, [&](auto& sums, int n) {
        if (keeps_s) rows.keep(sums, n, layer.kept, layer.ld_kept, layer.out);
        with_activation(layer.activation, [&](auto activation) {
          rows.each_pair(sums, n, [&](int, int, float* pair) {
            PYPERC_UNROLL
            for (int e = 0; e < 2; ++e) {
              pair[e] = decltype(activation)::f(Value<float>(pair[e]), layer.parameters).v;
            }
          });
        });
      });
      if (layer.kept && !keeps_s && layer.kept != g.y) rows.write(layer.kept, layer.ld_kept, layer.out);
      ++weights.turn;
    }
    rows.write(g.y, g.ld_y, g.layers[g.depth - 1].out);
    warp_sync();  // before the next rows come
  }
  copy_wait<0>();
}

// sums += ds^T x and the column sums of ds, over the rows of a tile; the first tile begins them.
template <class S, class T>
PYPERC_DEVICE void gradient(T* ds_data, T* x_data, const NarrowLayer<T>& layer, float* sums, bool first) {
  const OperandTile<T, S::WIDTH, S::BM, false> ds(ds_data), x(x_data);
  constexpr int AT_ONCE = S::WN < 64 ? S::WN : 64;  // columns
  constexpr int WARPS_MN = S::WARPS_M * S::WARPS_N, STEPS = S::BM / S::STEP / S::WARPS_K;
  const int k = warp() / WARPS_MN, m = warp() % WARPS_MN / S::WARPS_N * S::WM;
  const int n_end = (warp() % S::WARPS_N + 1) * S::WN;
  PYPERC_NO_UNROLL
  for (int n = n_end - S::WN; n < n_end; n += AT_ONCE) {
    if (m >= layer.out || n >= layer.in) break;
    FragmentC c[S::WM / 16][AT_ONCE / 8] = {};
    PYPERC_NO_UNROLL
    for (int step = k * STEPS; step < (k + 1) * STEPS; ++step) {
      FragmentA a[S::WM / 16];
      PYPERC_UNROLL
      for (int i = 0; i < S::WM / 16; ++i) a[i] = ds.as_a(m + i * 16, step);
      PYPERC_UNROLL
      for (int j = 0; j < AT_ONCE / 16; ++j) {
        FragmentB b[2];
        x.as_b(n + j * 16, step, b);
        PYPERC_UNROLL
        for (int i = 0; i < S::WM / 16; ++i) {
          mma<T>(c[i][2 * j], a[i], b[0]);
          mma<T>(c[i][2 * j + 1], a[i], b[1]);
        }
      }
    }
    PYPERC_UNROLL
    for (int i = 0; i < S::WM / 16; ++i) {
      PYPERC_UNROLL
      for (int j = 0; j < AT_ONCE / 8; ++j) {
        PYPERC_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int row = m + i * 16 + lane() / 4 + e / 2 * 8, column = n + j * 8 + lane() % 4 * 2 + e % 2;
          float* sum = sums + k * S::SUMS + row * S::WIDTH + column;
          *sum = c[i][j].r[e] + (first ? 0.0f : *sum);
        }
      }
    }
  }
  const int column = thread() % S::WIDTH, part = thread() / S::WIDTH;
  if (column < layer.out) {
    constexpr int COUNT = S::BM / S::PARTS;
    float* sum = sums + S::WARPS_K * S::SUMS + thread();
    float db = first ? 0.0f : *sum;
    for (int i = part * COUNT; i < (part + 1) * COUNT; ++i) db += widen(*ds.element(i, column));
    *sum = db;
  }
}

template <class T, class S>
PYPERC_KERNEL(S::THREADS, S::BLOCKS)
narrow_backward_kernel(PYPERC_PARAMETER NarrowBackward<T> g, PYPERC_PARAMETER Narrow p) {
  Weights<S, T> weights(shared_memory(), p.places, g.depth);
  auto* ds_data = reinterpret_cast<T*>(shared_memory() + p.places * S::WEIGHT);
  T* x_data = ds_data + S::BM * S::WIDTH;
  auto* sums = static_cast<float*>(g.workspace) + block() * g.depth * S::LAYER_SUMS;
  weights.begin(g.layers, g.depth - 1);
  for (int64_t t = block(); t < p.tiles; t += blocks()) {
    const Rows<S, T> ds(ds_data, t, g.batch), x(x_data, t, g.batch);
    const auto bring_kept = [&](const NarrowLayer<T>& layer) {
      x.bring(layer.kept, layer.ld_kept, layer.out);
      copy_wait<0>();
      warp_sync();
    };
    ds.bring(g.dy, g.ld_dy, g.layers[g.depth - 1].out);
    PYPERC_NO_UNROLL
    for (int l = g.depth - 1; l >= 0; --l) {
      // ds = dx * f'(what was kept): the layer's output is there from the layer above, which multiplied by it.
      const NarrowLayer<T>& layer = g.layers[l];
      const Saved saved = saved_by(layer.activation);
      if (saved != Saved::Nothing && (saved == Saved::Summation || l + 1 == g.depth)) bring_kept(layer);
      copy_wait<0>();
      warp_sync();
      with_activation(layer.activation, [&](auto activation) {
        ds.change(layer.out, x,
                  [&](auto dx, auto kept) { return decltype(activation)::backward(dx, kept, layer.parameters); });
      });
      warp_sync();
      // The layer's input: kept, or made again from the summation that was.
      if (l) {
        const NarrowLayer<T>& below = g.layers[l - 1];
        bring_kept(below);
        if (saved_by(below.activation) == Saved::Summation) {
          with_activation(below.activation, [&](auto activation) {
            using A = decltype(activation);
            if constexpr (A::saved == Saved::Summation) {
              x.change(below.out, x, [&](auto s, auto) { return A::f(s, below.parameters); });
            }
          });
        }
      } else {
        x.bring(g.x, g.ld_x, layer.in);
        copy_wait<0>();
      }
      sync();  // ds and x are there for all rows, the weights too, and the last layer's are read no more
      weights.bring_next(g.layers[l ? l - 1 : g.depth - 1]);
      gradient<S>(ds_data, x_data, layer, sums + l * S::LAYER_SUMS, t == block());
      sync();  // ds has been read
      if (l || g.dx) {
        ds.template multiply<false>(weights.weight(l), nullptr, layer.out, layer.in, [](auto&, int) {});
      }
      if (l == 0 && g.dx) ds.write(g.dx, g.ld_dx, layer.in);
      ++weights.turn;
    }
    warp_sync();
  }
  copy_wait<0>();
}

// dw and db of all layers from the sums of the blocks: 32 elements a block, whose warps share the sums out.
constexpr int NARROW_SUM_WARPS = 8, NARROW_SUM_THREADS = NARROW_SUM_WARPS * WARP;
template <class S>
constexpr int64_t NARROW_SUM_BLOCKS = S::WIDTH * (S::WIDTH + 1) / WARP;  // of a layer: its dw, and a row that is db

template <class T, class S>
PYPERC_KERNEL(NARROW_SUM_THREADS, 2)
narrow_sum_kernel(PYPERC_PARAMETER NarrowBackward<T> g, int64_t partial_sums) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int l = static_cast<int>(block() / NARROW_SUM_BLOCKS<S>);
  const int e = static_cast<int>(block() % NARROW_SUM_BLOCKS<S>) * WARP + lane();
  const int row = e / S::WIDTH, column = e % S::WIDTH;
  const NarrowLayer<T>& layer = g.layers[l];
  const bool is_w = row < layer.out && column < layer.in && g.dw[l];
  const bool is_b = row == S::WIDTH && column < layer.out && g.db[l];
  const int parts = is_w ? S::WARPS_K : is_b ? S::PARTS : 0, apart = is_w ? S::SUMS : S::WIDTH;
  const float* sums = static_cast<const float*>(g.workspace) + l * S::LAYER_SUMS;
  sums += is_w ? e : S::WARPS_K * S::SUMS + column;
  float sum = 0;
  for (int64_t b = warp(); b < partial_sums; b += NARROW_SUM_WARPS) {
    for (int part = 0; part < parts; ++part) sum += sums[b * g.depth * S::LAYER_SUMS + part * apart];
  }
  shared[thread()] = sum;
  sync();
  if (warp() || !parts) return;
  for (int w = 1; w < NARROW_SUM_WARPS; ++w) sum += shared[w * WARP + lane()];
  (is_w ? g.dw[l][row * layer.in + column] : g.db[l][column]) = narrow<T>(sum);
}

// Shared memory with places for the weights of so many layers.
template <class S>
constexpr size_t narrow_shared(int places) {
  return static_cast<size_t>(places) * S::WEIGHT + S::TILES * S::TILE;
}
template <class S, class PASS>
Narrow plan_narrow(const PASS& pass, const Device& device) {
  const bool all = narrow_shared<S>(pass.depth) <= device.shared;
  return {divide_up(pass.batch, S::BM), all ? pass.depth : std::min(pass.depth, 2)};
}
template <class S>
Grid narrow_grid(const Narrow& p, const Device& device) {
  constexpr size_t RESERVED = 1 << 10;  // of each block, by the system
  const size_t shared = narrow_shared<S>(p.places);
  const bool alone = S::BLOCKS * (shared + RESERVED) > device.shared + RESERVED;
  return {std::min<int64_t>(p.tiles, device.multiprocessors * (alone ? 1 : S::BLOCKS)), S::THREADS, shared};
}

// f(the shape that holds layers so wide)
template <class T, Pass PASS, class F>
auto with_narrow_shape(int widest, F f) {
  if (widest <= 32) return f(NarrowShape<T, 32, PASS>{});
  return widest <= 64 ? f(NarrowShape<T, 64, PASS>{}) : f(NarrowShape<T, NARROW_WIDTH, PASS>{});
}
template <class PASS>
int widest_of(const PASS& pass) {
  int widest = 0;
  for (int l = 0; l < pass.depth; ++l) widest = std::max({widest, pass.layers[l].in, pass.layers[l].out});
  return widest;
}

template <class T>
bool is_narrow(int depth, int widest, const Device& device) {
  if (depth > NARROW_DEPTH || widest > NARROW_WIDTH) return false;
  const auto fits = [&](auto shape) { return narrow_shared<decltype(shape)>(std::min(depth, 2)) <= device.shared; };
  return with_narrow_shape<T, Pass::Forward>(widest, fits) && with_narrow_shape<T, Pass::Backward>(widest, fits);
}

template <class T>
Status narrow_forward(const NarrowForward<T>& g, const Device& device, Stream stream) {
  if (g.batch == 0) return SUCCESS;
  return with_narrow_shape<T, Pass::Forward>(widest_of(g), [&](auto shape) {
    using S = decltype(shape);
    const Narrow p = plan_narrow<S>(g, device);
    return launch(narrow_forward_kernel<T, S>, narrow_grid<S>(p, device), stream, g, p);
  });
}

template <class T>
size_t narrow_workspace(const NarrowBackward<T>& g, const Device& device) {
  return with_narrow_shape<T, Pass::Backward>(widest_of(g), [&](auto shape) {
    using S = decltype(shape);
    const int64_t blocks = narrow_grid<S>(plan_narrow<S>(g, device), device).blocks;
    return static_cast<size_t>(blocks * g.depth * S::LAYER_SUMS) * sizeof(float);
  });
}

template <class T>
Status narrow_backward(const NarrowBackward<T>& g, const Device& device, Stream stream) {
  return with_narrow_shape<T, Pass::Backward>(widest_of(g), [&](auto shape) {
    using S = decltype(shape);
    const Narrow p = plan_narrow<S>(g, device);
    const Grid grid = narrow_grid<S>(p, device);
    const Status status = launch(narrow_backward_kernel<T, S>, grid, stream, g, p);
    if (status != SUCCESS) return status;
    return launch(narrow_sum_kernel<T, S>,
                  {g.depth * NARROW_SUM_BLOCKS<S>, NARROW_SUM_THREADS, NARROW_SUM_THREADS * sizeof(float)}, stream, g,
                  grid.blocks);
  });
}

#define PYPERC_NARROW(T)                                                             \
  template bool is_narrow<T>(int, int, const Device&);                               \
  template Status narrow_forward<T>(const NarrowForward<T>&, const Device&, Stream); \
  template size_t narrow_workspace<T>(const NarrowBackward<T>&, const Device&);      \
  template Status narrow_backward<T>(const NarrowBackward<T>&, const Device&, Stream);

}  // namespace pyperc::cuda
