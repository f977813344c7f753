// The kernels of the narrow network and their launchers, for the one dtype that each narrow_mlp_*.cu names.
//
// A warp has 16 rows and takes them through all layers: its part of a tile in shared memory is nobody else's. The
// weights of all layers stay in shared memory where it holds them, and else come by turns into two places, the next
// one's while this one's are used. A block goes over every n-th tile of rows.
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

template <class T, int WIDTH_>
struct NarrowShape {
  static constexpr int WIDTH = WIDTH_, WARPS = WIDTH * sizeof(T) > 256 ? 4 : 8, THREADS = WARPS * WARP;
  static constexpr int ROWS = 16, BM = WARPS * ROWS, STEP = 32 / sizeof(T);
  // How the warps share a layer's dw, and the parts of a column of db.
  static constexpr int WARPS_M = WIDTH / 32, WARPS_N = WARPS / WARPS_M, WM = 32, WN = WIDTH / WARPS_N;
  static constexpr int PARTS = THREADS / WIDTH, LAYER_SUMS = WIDTH * WIDTH + PARTS * WIDTH;
  static constexpr size_t WEIGHT = WIDTH * WIDTH * sizeof(T) + WIDTH * sizeof(float), TILE = BM * WIDTH * sizeof(T);
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

// The warp's 16 rows of a tile in shared memory.
template <class S, class T>
struct Rows {
  using Whole = Tile<T, S::BM, S::WIDTH>;
  static constexpr int SIZE = Vector<T>::SIZE, PIECES = Whole::PIECES;
  Whole tile;
  int first, height;  // of the tile; how many exist
  int64_t row;        // of the batch

  PYPERC_DEVICE Rows(T* data, int64_t t, int64_t batch) : tile{data} {
    first = warp() * S::ROWS;
    row = t * S::BM + first;
    height = batch > row ? limited(batch - row, S::ROWS) : 0;
  }

  // Starts the copy of [batch, width] rows; zero beyond.
  PYPERC_DEVICE void bring(const T* from, int64_t ld, int width) const {
    const bool whole = in_pieces(from, ld);
    PYPERC_NO_UNROLL
    for (int v = lane(); v < S::ROWS * PIECES; v += WARP) {
      const int i = v / PIECES, column = v % PIECES * SIZE;
      const int left = i < height ? width - column : 0, count = left >= SIZE ? SIZE : left > 0 ? left : 0;
      const T* source = count ? from + (row + i) * ld + column : from;
      T* to = tile.at(first + i, v % PIECES);
      if (whole) {
        copy_async<16>(to, source, count * static_cast<int>(sizeof(T)));
      } else {
        PYPERC_UNROLL
        for (int e = 0; e < SIZE; ++e) to[e] = e < count ? source[e] : T{};
      }
    }
    copy_commit();
  }

  // f(values, row of the batch, column, how many exist) for all pieces that hold columns below `width`; what f leaves
  // in the values goes back.
  template <class F>
  PYPERC_DEVICE void each(int width, F f) const {
    PYPERC_NO_UNROLL
    for (int v = lane(); v < S::ROWS * PIECES; v += WARP) {
      const int i = v / PIECES, column = v % PIECES * SIZE;
      if (column >= (width + S::STEP - 1) / S::STEP * S::STEP) continue;
      T* at = tile.at(first + i, v % PIECES);
      Wide<T> x[SIZE];
      read_row(at, SIZE, true, x);
      const int left = width - column;
      f(x, row + i, column, i < height ? (left < SIZE ? left : SIZE) : 0);
      write_row(at, SIZE, true, x);
    }
  }

  PYPERC_DEVICE void write(T* to, int64_t ld, int width) const {
    const bool whole = in_pieces(to, ld);
    each(width, [&](const Wide<T>(&x)[SIZE], int64_t i, int column, int count) {
      write_row(to + i * ld + column, count, whole, x);
    });
  }

  // x w^T + bias (ALONG_K) or ds w, in the place of x or ds.
  template <bool ALONG_K>
  PYPERC_DEVICE void multiply(T* weight, const float* bias, int in, int out) const {
    const OperandTile<T, S::BM, S::WIDTH, true> a(tile.data);
    const OperandTile<T, S::WIDTH, S::WIDTH, ALONG_K> b(weight);
    FragmentC c[S::WIDTH / 8] = {};
    PYPERC_NO_UNROLL
    for (int step = 0; step * S::STEP < in; ++step) {
      const FragmentA x = a.as_a(first, step);
      PYPERC_UNROLL
      for (int n = 0; n < S::WIDTH / 16; ++n) {
        if (n * 16 < out) {
          FragmentB w[2];
          b.as_b(n * 16, step, w);
          mma<T>(c[2 * n], x, w[0]);
          mma<T>(c[2 * n + 1], x, w[1]);
        }
      }
    }
    warp_sync();  // all have read the rows
    PYPERC_UNROLL
    for (int n = 0; n < S::WIDTH / 8; ++n) {
      if (n / 2 * 16 < out) {
        PYPERC_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int i = first + lane() / 4 + e / 2 * 8, column = n * 8 + lane() % 4 * 2 + e % 2;
          *tile.element(i, column) = narrow<T>(c[n].r[e] + (bias ? bias[column] : 0.0f));
        }
      }
    }
    warp_sync();
  }
};

// x = f(s) in the place of s, and what of both is to be written.
template <class A, class S, class T>
PYPERC_DEVICE void activate_layer(const Rows<S, T>& rows, const NarrowLayer<T>& layer, T* y, int64_t ld_y) {
  constexpr bool KEEPS_S = A::saved == Saved::Summation;
  const bool kept_whole = in_pieces(layer.kept, layer.ld_kept), whole = in_pieces(y, ld_y);
  rows.each(layer.out, [&](Wide<T>(&x)[Vector<T>::SIZE], int64_t i, int column, int count) {
    if (KEEPS_S && layer.kept) write_row(layer.kept + i * layer.ld_kept + column, count, kept_whole, x);
    PYPERC_UNROLL
    for (Wide<T>& e : x) e = A::f(Value<Wide<T>>(e), layer.parameters).v;
    if (!KEEPS_S && layer.kept && layer.kept != y) {
      write_row(layer.kept + i * layer.ld_kept + column, count, kept_whole, x);
    }
    if (y) write_row(y + i * ld_y + column, count, whole, x);
  });
}

// ds = dx * f'(kept) in the place of dx.
template <class A, class S, class T>
PYPERC_DEVICE void differentiate_layer(const Rows<S, T>& rows, const NarrowLayer<T>& layer) {
  const bool whole = in_pieces(layer.kept, layer.ld_kept);
  rows.each(layer.out, [&](Wide<T>(&x)[Vector<T>::SIZE], int64_t i, int column, int count) {
    Wide<T> kept[Vector<T>::SIZE] = {};
    if (A::saved != Saved::Nothing && count > 0) {
      read_row(layer.kept + i * layer.ld_kept + column, count, whole, kept);
    }
    PYPERC_UNROLL
    for (int e = 0; e < Vector<T>::SIZE; ++e) {
      x[e] = A::backward(Value<Wide<T>>(x[e]), Value<Wide<T>>(kept[e]), layer.parameters).v;
    }
  });
}

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

template <class T, class S>
PYPERC_KERNEL(S::THREADS, 1)
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
      rows.template multiply<true>(weights.weight(l), weights.bias(l), layer.in, layer.out);
      const bool last = l + 1 == g.depth;
      with_activation(layer.activation, [&](auto activation) {
        activate_layer<decltype(activation)>(rows, layer, last ? g.y : nullptr, g.ld_y);
      });
      warp_sync();
      ++weights.turn;
    }
  }
  copy_wait<0>();
}

// sums += ds^T x and the column sums of ds, over the rows of a tile; the first tile begins them.
template <class S, class T>
PYPERC_DEVICE void gradient(T* ds_data, T* x_data, const NarrowLayer<T>& layer, float* sums, bool first) {
  const OperandTile<T, S::WIDTH, S::BM, false> ds(ds_data), x(x_data);
  constexpr int AT_ONCE = S::WN < 64 ? S::WN : 64;  // columns
  const int m = warp() / S::WARPS_N * S::WM, n_end = (warp() % S::WARPS_N + 1) * S::WN;
  PYPERC_NO_UNROLL
  for (int n = n_end - S::WN; n < n_end; n += AT_ONCE) {
    if (m >= layer.out || n >= layer.in) break;
    FragmentC c[S::WM / 16][AT_ONCE / 8] = {};
    PYPERC_NO_UNROLL
    for (int step = 0; step < S::BM / S::STEP; ++step) {
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
          float* sum = sums + row * S::WIDTH + column;
          *sum = c[i][j].r[e] + (first ? 0.0f : *sum);
        }
      }
    }
  }
  const int column = thread() % S::WIDTH, part = thread() / S::WIDTH;
  if (column < layer.out) {
    constexpr int COUNT = S::BM / S::PARTS;
    float* sum = sums + S::WIDTH * S::WIDTH + thread();
    float db = first ? 0.0f : *sum;
    for (int i = part * COUNT; i < (part + 1) * COUNT; ++i) db += widen(*ds.element(i, column));
    *sum = db;
  }
}

template <class T, class S>
PYPERC_KERNEL(S::THREADS, 1)
narrow_backward_kernel(PYPERC_PARAMETER NarrowBackward<T> g, PYPERC_PARAMETER Narrow p) {
  Weights<S, T> weights(shared_memory(), p.places, g.depth);
  auto* ds_data = reinterpret_cast<T*>(shared_memory() + p.places * S::WEIGHT);
  T* x_data = ds_data + S::BM * S::WIDTH;
  auto* sums = static_cast<float*>(g.workspace) + block() * g.depth * S::LAYER_SUMS;
  weights.begin(g.layers, g.depth - 1);
  for (int64_t t = block(); t < p.tiles; t += blocks()) {
    const bool first = t == block();
    const Rows<S, T> ds(ds_data, t, g.batch), x(x_data, t, g.batch);
    ds.bring(g.dy, g.ld_dy, g.layers[g.depth - 1].out);
    copy_wait<0>();
    warp_sync();
    PYPERC_NO_UNROLL
    for (int l = g.depth - 1; l >= 0; --l) {
      const NarrowLayer<T>& layer = g.layers[l];
      with_activation(layer.activation, [&](auto activation) { differentiate_layer<decltype(activation)>(ds, layer); });
      // The layer's input: kept, or made again from the summation that was.
      if (l) {
        const NarrowLayer<T>& below = g.layers[l - 1];
        x.bring(below.kept, below.ld_kept, below.out);
        copy_wait<0>();
        warp_sync();
        with_activation(below.activation, [&](auto activation) {
          using A = decltype(activation);
          if constexpr (A::saved == Saved::Summation) {
            const NarrowLayer<T> made{below.in,         below.out,        nullptr, 0, nullptr,
                                      below.activation, below.parameters, nullptr, 0};
            activate_layer<A>(x, made, static_cast<T*>(nullptr), 0);
          }
        });
      } else {
        x.bring(g.x, g.ld_x, layer.in);
        copy_wait<0>();
      }
      sync();  // ds and x are there for all rows, the weights too, and the last layer's are read no more
      weights.bring_next(g.layers[l ? l - 1 : g.depth - 1]);
      gradient<S>(ds_data, x_data, layer, sums + l * S::LAYER_SUMS, first);
      sync();  // ds and x have been read
      if (l || g.dx) ds.template multiply<false>(weights.weight(l), nullptr, layer.out, layer.in);
      if (l == 0 && g.dx) ds.write(g.dx, g.ld_dx, layer.in);
      ++weights.turn;
    }
    warp_sync();
  }
  copy_wait<0>();
}

// dw and db of all layers from the sums of the blocks, in their order: an element a thread.
constexpr int NARROW_SUM_THREADS = 256;

template <class T, class S>
PYPERC_KERNEL(NARROW_SUM_THREADS, 2)
narrow_sum_kernel(PYPERC_PARAMETER NarrowBackward<T> g, int64_t partial_sums) {
  constexpr int BLOCKS_A_LAYER = S::WIDTH * (S::WIDTH + 1) / NARROW_SUM_THREADS + 1;
  const int l = static_cast<int>(block() / BLOCKS_A_LAYER);
  const int e = static_cast<int>(block() % BLOCKS_A_LAYER) * NARROW_SUM_THREADS + thread();
  const int row = e / S::WIDTH, column = e % S::WIDTH;
  const NarrowLayer<T>& layer = g.layers[l];
  const bool is_w = row < layer.out && column < layer.in && g.dw[l];
  const bool is_b = row == S::WIDTH && column < layer.out && g.db[l];
  if (!is_w && !is_b) return;
  const float* sums = static_cast<const float*>(g.workspace) + l * S::LAYER_SUMS + e;
  float sum = 0;
  for (int64_t b = 0; b < partial_sums; ++b) {
    const float* of_block = sums + b * g.depth * S::LAYER_SUMS;
    for (int part = 0; part < (is_b ? S::PARTS : 1); ++part) sum += of_block[part * S::WIDTH];
  }
  (is_w ? g.dw[l][row * layer.in + column] : g.db[l][column]) = narrow<T>(sum);
}

template <class T, class S, class PASS>
Narrow plan_narrow(const PASS& pass, const Device& device, int tiles_of_rows) {
  const size_t all = static_cast<size_t>(pass.depth) * S::WEIGHT + static_cast<size_t>(tiles_of_rows) * S::TILE;
  return {divide_up(pass.batch, S::BM), all <= device.shared ? pass.depth : std::min(pass.depth, 2)};
}
template <class S, class PASS>
Grid narrow_grid(const PASS&, const Narrow& p, const Device& device, int tiles_of_rows) {
  return {std::min<int64_t>(p.tiles, device.multiprocessors), S::THREADS,
          static_cast<size_t>(p.places) * S::WEIGHT + static_cast<size_t>(tiles_of_rows) * S::TILE};
}

// f(the shape that holds the network)
template <class T, class PASS, class F>
auto with_narrow_shape(const PASS& pass, F f) {
  int widest = 0;
  for (int l = 0; l < pass.depth; ++l) widest = std::max({widest, pass.layers[l].in, pass.layers[l].out});
  return widest <= 64 ? f(NarrowShape<T, 64>{}) : f(NarrowShape<T, NARROW_WIDTH>{});
}

template <class T>
bool is_narrow(int depth, int widest, const Device& device) {
  if (depth > NARROW_DEPTH || widest > NARROW_WIDTH || sizeof(T) > 4) return false;
  const auto fits = [&](auto shape) {
    using S = decltype(shape);
    return static_cast<size_t>(std::min(depth, 2)) * S::WEIGHT + 2 * S::TILE <= device.shared;
  };
  return widest <= 64 ? fits(NarrowShape<T, 64>{}) : fits(NarrowShape<T, NARROW_WIDTH>{});
}

template <class T>
Status narrow_forward(const NarrowForward<T>& g, const Device& device, Stream stream) {
  if (g.batch == 0) return SUCCESS;
  return with_narrow_shape<T>(g, [&](auto shape) {
    using S = decltype(shape);
    const Narrow p = plan_narrow<T, S>(g, device, 1);
    return launch(narrow_forward_kernel<T, S>, narrow_grid<S>(g, p, device, 1), stream, g, p);
  });
}

template <class T>
size_t narrow_workspace(const NarrowBackward<T>& g, const Device& device) {
  return with_narrow_shape<T>(g, [&](auto shape) {
    using S = decltype(shape);
    const Narrow p = plan_narrow<T, S>(g, device, 2);
    const int64_t blocks = narrow_grid<S>(g, p, device, 2).blocks;
    return static_cast<size_t>(blocks * g.depth * S::LAYER_SUMS) * sizeof(float);
  });
}

template <class T>
Status narrow_backward(const NarrowBackward<T>& g, const Device& device, Stream stream) {
  return with_narrow_shape<T>(g, [&](auto shape) {
    using S = decltype(shape);
    const Narrow p = plan_narrow<T, S>(g, device, 2);
    const Grid grid = narrow_grid<S>(g, p, device, 2);
    const Status status = launch(narrow_backward_kernel<T, S>, grid, stream, g, p);
    if (status != SUCCESS) return status;
    constexpr int64_t BLOCKS_A_LAYER = S::WIDTH * (S::WIDTH + 1) / NARROW_SUM_THREADS + 1;
    return launch(narrow_sum_kernel<T, S>, {g.depth * BLOCKS_A_LAYER, NARROW_SUM_THREADS}, stream, g, grid.blocks);
  });
}

#define PYPERC_NARROW(T)                                                             \
  template bool is_narrow<T>(int, int, const Device&);                               \
  template Status narrow_forward<T>(const NarrowForward<T>&, const Device&, Stream); \
  template size_t narrow_workspace<T>(const NarrowBackward<T>&, const Device&);      \
  template Status narrow_backward<T>(const NarrowBackward<T>&, const Device&, Stream);

}  // namespace pyperc::cuda
