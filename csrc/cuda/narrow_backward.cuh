// A narrow network backward, a layer at a time, from ds to the ds of the layer below, dw and db in one kernel.
//
// A block goes over every n-th tile of rows. The tiles of ds and of the layer's input come in two stages, the next ones
// while these are used. A warp takes its rows of ds through the weights, which stay in shared memory, multiplies by f'
// and writes them out; then the block's warps share out dw = ds^T x over all rows of the tile, and keep their sums in
// registers over all tiles. A second kernel adds the sums of the blocks in their order.
#pragma once

#include <algorithm>

#include "narrow_rows.cuh"

namespace pyperc::cuda {

// Five tiles in shared memory beside the weights, of rows of WIDTH sizeof(T) bytes. Where these are long, the registers
// of twice as many warps as have rows hold the sums of dw.
template <class T, int WIDTH_>
struct BackwardShape {
  static constexpr int WIDTH = WIDTH_, BYTES = WIDTH * sizeof(T);
  static constexpr int WARPS = BYTES > 256 ? 8 : 4, THREADS = WARPS * WARP;
  static constexpr int BLOCKS = BYTES > 256 ? 1 : BYTES > 128 ? 2 : 4;
  static constexpr int HEIGHT = 1, ROWS = 16, BM = 64, STEP = 32 / sizeof(T), STEPS = WIDTH / STEP;
  // How the warps share a layer's dw, in rows, columns and terms of its sums.
  static constexpr int WM = std::max(32, WIDTH * 2 / WARPS), WARPS_M = WIDTH / WM, WN = WIDTH / 2, WARPS_N = 2;
  static constexpr int WARPS_K = WARPS / (WARPS_M * WARPS_N);
  static constexpr int PARTS = sizeof(T) == 2 ? WARPS_K : THREADS / WIDTH;  // of a column of db
  static constexpr int SUMS = WIDTH * WIDTH, LAYER_SUMS = WARPS_K * SUMS + PARTS * WIDTH;
  static constexpr int TILE = BM * WIDTH;
  static constexpr size_t SHARED = (SUMS + 5 * TILE) * sizeof(T);
};

// One layer. `x` is its input, or where the activation below keeps its summation, that one; below = (ds w) f'(x).
template <class T>
struct NarrowStep {
  int64_t batch;
  int in, out;
  const T* w;
  int64_t ld_w;
  const T* ds;
  int64_t ld_ds;
  const T* x;
  int64_t ld_x;
  T* below;  // may be ds; null where not wanted
  int64_t ld_below;
  Activation activation;  // of the layer below; identity where there is none
  Parameters parameters;
  float* sums;  // the layer's of the first block
  int64_t sums_apart;
};

// db, the column sums of ds: in 16 bits as ds^T 1, by the warps that have the first columns of dw; in float32, which
// TF32 would round, a thread's share of a column.
template <class S, class T>
struct BiasGradient {
  FragmentC sums[S::WM / 16] = {};

  PYPERC_DEVICE void add(int i, const FragmentA& ds) {
    const uint32_t one = narrow_pair<T>(1, 1);
    mma<T>(sums[i], ds, {{one, one}});
  }
  PYPERC_DEVICE void add(const OperandTile<T, S::WIDTH, S::BM, false>&) {}
  PYPERC_DEVICE void write(float* to, int k, int m) const {
    if (lane() % 4) return;
    PYPERC_UNROLL
    for (int i = 0; i < S::WM / 16; ++i) {
      PYPERC_UNROLL
      for (int half = 0; half < 2; ++half) {
        to[k * S::WIDTH + m + i * 16 + half * 8 + lane() / 4] = sums[i].r[half * 2];
      }
    }
  }
};
template <class S>
struct BiasGradient<S, float> {
  float sum = 0;

  PYPERC_DEVICE void add(int, const FragmentA&) {}
  PYPERC_DEVICE void add(const OperandTile<float, S::WIDTH, S::BM, false>& ds) {
    constexpr int COUNT = S::BM / S::PARTS;
    const int first = thread() / S::WIDTH * COUNT;
    for (int i = first; i < first + COUNT; ++i) sum += *ds.element(i, thread() % S::WIDTH);
  }
  PYPERC_DEVICE void write(float* to) const { to[thread()] = sum; }
};

// A warp's share of dw = ds^T x and of db, over the rows of all tiles.
template <class S, class T>
struct Gradient {
  FragmentC dw[S::WM / 16][S::WN / 8] = {};
  BiasGradient<S, T> db;
  int k, m, n;

  PYPERC_DEVICE Gradient() {
    constexpr int WARPS_MN = S::WARPS_M * S::WARPS_N;
    k = warp() / WARPS_MN;
    m = warp() % WARPS_MN / S::WARPS_N * S::WM;
    n = warp() % S::WARPS_N * S::WN;
  }
  PYPERC_DEVICE void add(T* ds_data, T* x_data, int out, int in) {
    const OperandTile<T, S::WIDTH, S::BM, false> ds(ds_data), x(x_data);
    constexpr int STEPS = S::BM / S::STEP / S::WARPS_K;
    db.add(ds);
    if (m >= out || (n && n >= in)) return;
    PYPERC_NO_UNROLL
    for (int step = k * STEPS; step < (k + 1) * STEPS; ++step) {
      FragmentA a[S::WM / 16];
      PYPERC_UNROLL
      for (int i = 0; i < S::WM / 16; ++i) a[i] = ds.as_a(m + i * 16, step);
      PYPERC_UNROLL
      for (int j = 0; j < S::WN / 16; ++j) {
        FragmentB b[2];
        x.as_b(n + j * 16, step, b);
        PYPERC_UNROLL
        for (int i = 0; i < S::WM / 16; ++i) {
          mma<T>(dw[i][2 * j], a[i], b[0]);
          mma<T>(dw[i][2 * j + 1], a[i], b[1]);
        }
      }
      if (n == 0) {
        PYPERC_UNROLL
        for (int i = 0; i < S::WM / 16; ++i) db.add(i, a[i]);
      }
    }
  }
  PYPERC_DEVICE void write(float* sums) const {
    PYPERC_UNROLL
    for (int i = 0; i < S::WM / 16; ++i) {
      PYPERC_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = m + i * 16 + half * 8 + lane() / 4;
        PYPERC_UNROLL
        for (int j = 0; j < S::WN / 8; ++j) {
          store_pair(sums + k * S::SUMS + row * S::WIDTH + n + j * 8 + lane() % 4 * 2, dw[i][j].r[half * 2],
                     dw[i][j].r[half * 2 + 1]);
        }
      }
    }
    float* columns = sums + S::WARPS_K * S::SUMS;
    if constexpr (sizeof(T) == 4) {
      db.write(columns);
    } else if (n == 0) {
      db.write(columns, k, m);
    }
  }
};

template <class T, class S>
PYPERC_KERNEL(S::THREADS, S::BLOCKS)
narrow_backward_kernel(PYPERC_PARAMETER NarrowStep<T> g) {
  auto* weight = reinterpret_cast<T*>(shared_memory());
  T *stages = weight + S::SUMS, *below_data = stages + 4 * S::TILE;
  const auto ds_of = [&](int64_t t, int stage) { return Rows<S, T>(stages + stage * (2 * S::TILE), t, g.batch); };
  const auto x_of = [&](int64_t t, int stage) { return Rows<S, T>(ds_of(t, stage).tile.data + S::TILE, t, g.batch); };
  const bool has_rows = warp() < S::BM / S::ROWS;
  const int64_t tiles = divide_up(g.batch, S::BM);
  const auto bring = [&](int64_t t, int stage) {
    if (has_rows && t < tiles) {
      ds_of(t, stage).bring(g.ds, g.ld_ds, g.out);
      x_of(t, stage).bring(g.x, g.ld_x, g.in);
    }
    copy_commit();  // an empty group where there are none
  };
  Gradient<S, T> gradient;

  if (g.below) bring_weights<S>(weight, g.w, g.ld_w, g.out, g.in);
  bring(block(), 0);
  int stage = 0;
  PYPERC_NO_UNROLL
  for (int64_t t = block(); t < tiles; t += blocks(), stage = 1 - stage) {
    bring(t + blocks(), 1 - stage);
    copy_wait<1>();
    const Rows<S, T> ds = ds_of(t, stage), x = x_of(t, stage), below(below_data, t, g.batch);
    if (t == block()) {
      sync();  // the weights are there for all
    } else {
      warp_sync();
    }
    if (has_rows && g.below) {
      ds.template multiply<false>(weight, nullptr, g.out, g.in, below.tile, [&](auto& sums, int n) {
        with_activation(g.activation, [&](auto activation) {
          using A = decltype(activation);
          x.each_pair(sums, [&](int i, int column, float* pair) {
            float kept[2] = {};
            if constexpr (A::saved != Saved::Nothing)
              load_pair(x.tile.element(x.first + i, n, column), kept[0], kept[1]);
            PYPERC_UNROLL
            for (int e = 0; e < 2; ++e) {
              pair[e] = A::backward(Value<float>(pair[e]), Value<float>(kept[e]), g.parameters).v;
            }
          });
        });
      });
    }
    // The input again, where x was the summation.
    if (has_rows) x.activate(g.in, g.activation, g.parameters);
    sync();  // ds and x are there for all rows
    if (has_rows) below.write(g.below, g.ld_below, g.in);
    warp_sync();
    gradient.add(ds.tile.data, x.tile.data, g.out, g.in);
    sync();  // they have been read: the next ones may come
  }
  copy_wait<0>();
  gradient.write(g.sums + block() * g.sums_apart);
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

}  // namespace pyperc::cuda
