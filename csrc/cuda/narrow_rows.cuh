// What the kernels of narrow networks have in common: the rows of a warp in a tile in shared memory, which no other
// warp writes, and their product with a layer's weights.
#pragma once

#include "epilogue.cuh"
#include "launch.cuh"
#include "narrow_mlp.h"
#include "operand.cuh"

namespace pyperc::cuda {

// Whether rows that lie ld apart can be read and written in whole pieces of 16 bytes.
template <class T>
PYPERC_DEVICE bool in_pieces(const T* data, int64_t ld) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(ld) * sizeof(T)) % 16 == 0;
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

// Starts the copy of the weights [out, in] into a tile; zero beyond.
template <class S, class T>
PYPERC_DEVICE void bring_weights(T* to, const T* from, int64_t ld, int out, int in) {
  const Tile<T, S::WIDTH, S::WIDTH> w{to};
  if (in_pieces(from, ld)) {
    constexpr int ROWS = 32;  // at once, for the registers' sake
    PYPERC_NO_UNROLL
    for (int i = 0; i < S::WIDTH; i += ROWS) {
      Tile<T, ROWS, S::WIDTH>{w.at(i, 0)}.template copy<S::THREADS>(from + i * ld, ld, out - i, in, thread());
    }
  } else {
    gather<S::THREADS>(w, from, ld, 1, out, in);
  }
}

// The rows of a warp in a tile.
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
  }
  // Into [batch, width] rows, or nowhere.
  PYPERC_DEVICE void write(T* to, int64_t ld, int width) const {
    if (!to) return;
    const bool whole = in_pieces(to, ld);
    each_piece(width, [&](int i, int piece, int count) {
      const Vector<T> x = load16(tile.at(first + i, piece));
      T* at = to + (row + i) * ld + piece * SIZE;
      if (whole && count == SIZE) {
        store16(at, x);
      } else {
        PYPERC_UNROLL
        for (int e = 0; e < SIZE; ++e) {
          if (e < count) at[e] = x.e[e];
        }
      }
    });
  }
  // Elements s become f(s), and what is none becomes 0, where backward reads s of the activation; else nothing does.
  PYPERC_DEVICE void activate(int width, Activation activation, const Parameters& parameters) const {
    with_activation(activation, [&](auto a) {
      using A = decltype(a);
      if constexpr (A::saved == Saved::Summation) {
        each_piece(width, [&](int i, int piece, int count) {
          T* at = tile.at(first + i, piece);
          Wide<T> s[SIZE];
          read_row(at, SIZE, true, s);
          PYPERC_UNROLL
          for (int e = 0; e < SIZE; ++e) s[e] = e < count ? A::f(Value<Wide<T>>(s[e]), parameters).v : 0;
          write_row(at, SIZE, true, s);
        });
      }
    });
  }

  // f(row of the warp, column after n, its pair of sums) for all of a thread's.
  template <class F>
  static PYPERC_DEVICE void each_pair(Sums& c, F f) {
    PYPERC_UNROLL
    for (int i = 0; i < S::HEIGHT; ++i) {
      PYPERC_UNROLL
      for (int j = 0; j < 2; ++j) {
        PYPERC_UNROLL
        for (int half = 0; half < 2; ++half) {
          f(i * 16 + half * 8 + lane() / 4, j * 8 + lane() % 4 * 2, &c[i][j].r[2 * half]);
        }
      }
    }
  }
  // x w^T + bias (ALONG_K) or ds w, as finish(sums, first column) leaves them, into a tile, which may be this one.
  template <bool ALONG_K, class F>
  PYPERC_DEVICE void multiply(T* weight, const float* bias, int in, int out, const Tile<T, S::BM, S::WIDTH>& to,
                              F finish) const {
    const OperandTile<T, S::BM, S::WIDTH, true> a(tile.data);
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
      // Rows n and on of w, which lie as those of the tile's beginning do; or the columns.
      const OperandTile<T, S::WIDTH, S::WIDTH, ALONG_K> b(weight + (ALONG_K ? n * S::WIDTH : 0));
      PYPERC_UNROLL
      for (int k = 0; k < S::STEPS; ++k) {
        if (!decltype(all_steps)::value && k * S::STEP >= in) break;
        FragmentB w[2];
        b.as_b(ALONG_K ? 0 : n, k, w);
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
        each_pair(c, [&](int, int column, float* pair) {
          pair[0] = bias[n + column];
          pair[1] = bias[n + column + 1];
        });
      }
      if (in > S::WIDTH - S::STEP) {
        add(std::true_type(), c, n);
      } else {
        add(std::false_type(), c, n);
      }
      finish(c, n);
      each_pair(c, [&](int i, int column, const float* pair) {
        store_pair(to.element(first + i, n, column), pair[0], pair[1]);
      });
    }
    warp_sync();
  }
};

}  // namespace pyperc::cuda
