// What follows on a product: the block's sums lie in shared memory, and go out row by row, 16 bytes a thread.
#pragma once

#include "gemm.h"
#include "tile.cuh"
#include "value.cuh"

namespace pyperc::cuda {

// How the blocks of a product share m, n and k, and what the launcher knows of the addresses.
struct Blocks {
  uint32_t tiles_m, tiles_n, splits;
  int64_t k;                // of a split
  bool a_whole, b_whole;    // whether a and b lie as the product's copies of 16 bytes want them
  bool aligned, partial16;  // whether all rows that the epilogue touches, and those of the partial sums, are aligned
};

// Where a block works: neighbours in time share rows of a and columns of b, which then come from the cache.
struct Place {
  int64_t m, n, k;
  int height, width, steps, last;  // rows and columns of the block that exist; steps along k, the terms of the last one
  uint32_t row, split;

  template <class T>
  PYPERC_DEVICE Place(const Gemm<T>& g, const Blocks& p, int bm, int bn, int bk) {
    constexpr uint32_t GROUP = 8;
    const uint32_t tiles = p.tiles_m * p.tiles_n, t = static_cast<uint32_t>(block()) % tiles;
    split = static_cast<uint32_t>(block()) / tiles;
    const uint32_t first = t / (GROUP * p.tiles_n) * GROUP, within = t % (GROUP * p.tiles_n);
    const uint32_t rows = p.tiles_m - first < GROUP ? p.tiles_m - first : GROUP;
    row = first + within % rows;
    m = static_cast<int64_t>(row) * bm;
    n = static_cast<int64_t>(within / rows) * bn;
    k = split * p.k;
    const int64_t terms = k + p.k < g.k ? p.k : g.k - k;
    height = limited(g.m - m, bm);
    width = limited(g.n - n, bn);
    steps = static_cast<int>(divide_up(terms, bk));
    last = static_cast<int>(terms - static_cast<int64_t>(steps - 1) * bk);
  }
};

// `count` elements of a row, 16 bytes at once where they are whole and aligned.
template <class T>
PYPERC_DEVICE void read_row(const T* from, int count, bool aligned, Wide<T> (&to)[Vector<T>::SIZE]) {
  constexpr int SIZE = Vector<T>::SIZE;
  if (aligned && count == SIZE) {
    const Vector<T> v = load16(from);
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) to[e] = widen(v.e[e]);
  } else {
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) to[e] = e < count ? widen(from[e]) : Wide<T>(0);
  }
}
template <class T>
PYPERC_DEVICE void write_row(T* to, int count, bool aligned, const Wide<T> (&from)[Vector<T>::SIZE]) {
  constexpr int SIZE = Vector<T>::SIZE;
  if (aligned && count == SIZE) {
    Vector<T> v;
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) v.e[e] = narrow<T>(from[e]);
    store16(to, v);
  } else {
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) {
      if (e < count) to[e] = narrow<T>(from[e]);
    }
  }
}

// The sums of a block of BM x BN, and the part of a thread: SIZE columns, of every ROWS-th row.
template <class T, int BM, int BN, int THREADS>
struct Sums {
  static constexpr int SIZE = Vector<T>::SIZE, ACROSS = BN / SIZE, ROWS = THREADS / ACROSS;
  using Shared = Tile<Wide<T>, BM, BN>;
  Shared shared;
  int row, column, rows, count;  // the first row and column; how many rows and columns of the block exist

  PYPERC_DEVICE Sums(Shared tile, int height, int width) : shared(tile) {
    row = thread() / ACROSS;
    column = thread() % ACROSS * SIZE;
    count = width - column < SIZE ? width - column : SIZE;
    rows = count > 0 ? height : 0;
  }
  PYPERC_DEVICE void read(int i, Wide<T> (&v)[SIZE]) const {
    constexpr int PIECE = Shared::PIECE;
    PYPERC_UNROLL
    for (int p = 0; p < SIZE / PIECE; ++p) {
      const Vector<Wide<T>> piece = load16(shared.at(i, column / PIECE + p));
      PYPERC_UNROLL
      for (int e = 0; e < PIECE; ++e) v[p * PIECE + e] = piece.e[e];
    }
  }

  template <class A>
  PYPERC_DEVICE void activate(const Gemm<T>& g, const Place& at, bool aligned) const {
    Wide<T> bias[SIZE] = {};
    const int64_t n = at.n + column;
    if (g.bias && rows) read_row(g.bias + n, count, false, bias);
    PYPERC_NO_UNROLL
    for (int i = row; i < rows; i += ROWS) {
      Wide<T> v[SIZE];
      read(i, v);
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) v[e] += bias[e];
      if (g.s) write_row(g.s + (at.m + i) * g.ld_s + n, count, aligned, v);
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) v[e] = A::f(Value<Wide<T>>(v[e]), g.parameters).v;
      write_row(g.c + (at.m + i) * g.ldc + n, count, aligned, v);
    }
  }

  // And db: the block's part of it in a row of the workspace.
  template <class A>
  PYPERC_DEVICE void differentiate(const Gemm<T>& g, const Place& at, bool aligned) const {
    Wide<T> sums[SIZE] = {};
    const int64_t n = at.n + column;
    PYPERC_NO_UNROLL
    for (int i = row; i < rows; i += ROWS) {
      Wide<T> v[SIZE], saved[SIZE] = {};
      read(i, v);
      if constexpr (A::saved != Saved::Nothing) {
        read_row(g.saved + (at.m + i) * g.ld_saved + n, count, aligned, saved);
      }
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) {
        v[e] = A::backward(Value<Wide<T>>(v[e]), Value<Wide<T>>(saved[e]), g.parameters).v;
        sums[e] += v[e];
      }
      write_row(g.c + (at.m + i) * g.ldc + n, count, aligned, v);
    }
    if (!g.db) return;
    sync();  // the sums have been read: their place is free
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) shared.data[row * BN + column + e] = sums[e];
    sync();
    for (int j = thread(); j < BN && at.n + j < g.n; j += THREADS) {
      Wide<T> sum = shared.data[j];
      for (int r = 1; r < ROWS; ++r) sum += shared.data[r * BN + j];
      static_cast<Wide<T>*>(g.workspace)[at.row * g.n + at.n + j] = sum;
    }
  }

  template <Epilogue E>
  PYPERC_DEVICE void finish(const Gemm<T>& g, const Place& at, const Blocks& p) const {
    if constexpr (E == Epilogue::Nothing) {
      auto* partial = static_cast<Wide<T>*>(g.workspace) + at.split * g.m * g.n;
      for (int i = row; i < rows; i += ROWS) {
        Wide<T> v[SIZE];
        read(i, v);
        if (p.splits == 1) {
          write_row(g.c + (at.m + i) * g.ldc + at.n + column, count, p.aligned, v);
        } else {
          Wide<T>* to = partial + (at.m + i) * g.n + at.n + column;
          PYPERC_UNROLL
          for (int q = 0; q < SIZE / Shared::PIECE; ++q) {
            Wide<T> piece[Shared::PIECE];
            PYPERC_UNROLL
            for (int e = 0; e < Shared::PIECE; ++e) piece[e] = v[q * Shared::PIECE + e];
            const int left = count - q * Shared::PIECE;
            write_row(to + q * Shared::PIECE, left < Shared::PIECE ? left : Shared::PIECE, p.partial16, piece);
          }
        }
      }
    } else {
      switch (g.activation) {
#define X(A)                                 \
  case Activation::A:                        \
    if constexpr (E == Epilogue::Activate) { \
      activate<A>(g, at, p.aligned);         \
    } else {                                 \
      differentiate<A>(g, at, p.aligned);    \
    }                                        \
    break;
        PYPERC_ACTIVATIONS(X)
#undef X
      }
    }
  }
};

}  // namespace pyperc::cuda
