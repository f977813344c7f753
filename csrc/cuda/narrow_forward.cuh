// A narrow network forward, in one kernel.
//
// A warp has 32 rows, or 16, and takes them through all layers: its part of a tile in shared memory holds what is
// between two layers; a layer's activation is applied to its sums in registers, or where backward will read the sums,
// to what is kept of them. The weights of all layers stay in shared memory where it holds them, and else come by turns
// into two places, the next one's while this one's are used. A block goes over every n-th tile of rows.
#pragma once

#include "narrow_rows.cuh"

namespace pyperc::cuda {

// A row of the tile takes WIDTH sizeof(T) bytes: where that is long, a warp has 16 rows, and one block fills a
// multiprocessor.
template <class T, int WIDTH_>
struct ForwardShape {
  static constexpr int WIDTH = WIDTH_, BYTES = WIDTH * sizeof(T);
  static constexpr int WARPS = BYTES > 256 ? 4 : 8, THREADS = WARPS * WARP, BLOCKS = BYTES > 128 ? 1 : 2;
  static constexpr int HEIGHT = BYTES > 256 ? 1 : 2;  // matrix tiles of 16 rows
  static constexpr int ROWS = 16 * HEIGHT, BM = WARPS * ROWS, STEP = 32 / sizeof(T), STEPS = WIDTH / STEP;
  static constexpr size_t WEIGHT = WIDTH * WIDTH * sizeof(T) + WIDTH * sizeof(float), TILE = BM * WIDTH * sizeof(T);
  static constexpr size_t shared(int places) { return static_cast<size_t>(places) * WEIGHT + TILE; }
};

// The weights and biases of the layers in shared memory: a place for each layer, or two.
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
    bring_weights<S>(data + to * S::WIDTH * S::WIDTH, layer.w, layer.ld_w, layer.out, layer.in);
    for (int i = thread(); i < S::WIDTH; i += S::THREADS) {
      biases[to * S::WIDTH + i] = layer.b && i < layer.out ? widen(layer.b[i]) : 0.0f;
    }
  }
  PYPERC_DEVICE void begin(const NarrowLayer<T>* layers) const {
    for (int l = 0; l < (resident() ? depth : 1); ++l) bring(layers[l], l);
    copy_commit();
    copy_wait<0>();
    sync();
  }
  // Between two barriers of a layer, while nobody reads the other place.
  PYPERC_DEVICE void bring_next(const NarrowLayer<T>& next) const {
    bring(next, (turn + 1) % 2);
    copy_commit();
  }
};

template <class T, class S>
PYPERC_KERNEL(S::THREADS, S::BLOCKS)
narrow_forward_kernel(PYPERC_PARAMETER NarrowForward<T> g, int places) {
  Weights<S, T> weights(shared_memory(), places, g.depth);
  auto* data = reinterpret_cast<T*>(shared_memory() + places * S::WEIGHT);
  weights.begin(g.layers);
  for (int64_t t = block(), tiles = divide_up(g.batch, S::BM); t < tiles; t += blocks()) {
    const Rows<S, T> rows(data, t, g.batch);
    rows.bring(g.x, g.ld_x, g.layers[0].in);
    copy_commit();
    PYPERC_NO_UNROLL
    for (int l = 0; l < g.depth; ++l) {
      const NarrowLayer<T>& layer = g.layers[l];
      copy_wait<0>();
      if (weights.resident()) {
        warp_sync();
      } else {
        sync();  // this layer's weights are there for all, and nobody reads the last one's any more
        weights.bring_next(g.layers[l + 1 < g.depth ? l + 1 : 0]);
        warp_sync();
      }
      const auto finish = [&](auto& sums, int n) {
        with_activation(layer.activation, [&](auto activation) {
          using A = decltype(activation);
          if constexpr (A::saved != Saved::Summation) {
            rows.each_pair(sums, [&](int, int, float* pair) {
              PYPERC_UNROLL
              for (int e = 0; e < 2; ++e) pair[e] = A::f(Value<float>(pair[e]), layer.parameters).v;
            });
          }
        });
        if (n + 16 <= layer.out) return;
        rows.each_pair(sums, [&](int, int column, float* pair) {  // beyond the last column, 0 times infinity was NaN
          PYPERC_UNROLL
          for (int e = 0; e < 2; ++e) pair[e] = n + column + e < layer.out ? pair[e] : 0;
        });
      };
      rows.template multiply<true>(weights.weight(l), weights.bias(l), layer.in, layer.out, rows.tile, finish);
      if (layer.kept != g.y) rows.write(layer.kept, layer.ld_kept, layer.out);
      // Where the sums are what is kept, f is of the kept ones, rounded: with backward's f', and as torch has it.
      rows.activate(layer.out, layer.activation, layer.parameters);
      ++weights.turn;
    }
    rows.write(g.y, g.ld_y, g.layers[g.depth - 1].out);
    warp_sync();  // before the next rows come
  }
  copy_wait<0>();
}

}  // namespace pyperc::cuda
