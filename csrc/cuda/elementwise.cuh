// The elementwise kernels and their launchers, for the one dtype that each elementwise_*.cu names.
//
// A block is 256 threads in `lanes` columns of vectors by 256 / lanes rows. A thread keeps its columns and goes down
// the rows of its block, some at a time, so that four loads are under way; its part of db stays in registers. Where
// every row begins at a multiple of 16 bytes the columns of a thread are neighbours, 16 bytes; elsewhere they lie
// `lanes` apart, so that a warp's accesses of one element each are neighbours.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "launch.cuh"
#include "sum_rows.cuh"
#include "value.cuh"

namespace pyperc::cuda {

constexpr int ELEMENTWISE_THREADS = 256;
constexpr int LOADS_AT_ONCE = 4;
// How many blocks a multiprocessor is to hold, of each kernel: as many as the registers allow without spilling.
template <class T>
constexpr int ACTIVATE_BLOCKS = sizeof(T) == 8 ? 2 : 3;
template <class T>
constexpr int DIFFERENTIATE_BLOCKS = sizeof(T) == 8 ? 1 : 3;

struct Tiling {
  int lanes_log2;
  uint32_t column_tiles;  // block = row tile * column_tiles + column tile
  int64_t rows;           // of a block
  bool aligned;

  PYPERC_INLINE int lanes() const { return 1 << lanes_log2; }
};

// A thread's columns, and the rows that it goes through.
template <class T>
struct Cells {
  static constexpr int SIZE = Vector<T>::SIZE;
  int64_t base, columns;  // the block's first column; all columns
  int first, step;        // of the thread's, from base on
  int64_t row, end;
  int rows_apart;
  bool whole;  // 16 bytes at once

  PYPERC_DEVICE Cells(const Tiling& tiling, int64_t all_rows, int64_t all_columns) : columns(all_columns) {
    const auto b = static_cast<uint32_t>(block());
    const int lanes = tiling.lanes(), x = thread() & (lanes - 1);
    base = static_cast<int64_t>(b % tiling.column_tiles) * (lanes * SIZE);
    first = tiling.aligned ? x * SIZE : x;
    step = tiling.aligned ? 1 : lanes;
    rows_apart = ELEMENTWISE_THREADS >> tiling.lanes_log2;
    row = static_cast<int64_t>(b / tiling.column_tiles) * tiling.rows;
    end = row + tiling.rows < all_rows ? row + tiling.rows : all_rows;
    row += thread() >> tiling.lanes_log2;
    whole = tiling.aligned && base + first + SIZE <= columns;
  }
  PYPERC_DEVICE int64_t column(int e) const { return base + first + e * step; }
};

// A thread's columns of one row, and back; what lies beyond the matrix is zero and is not written.
template <bool WHOLE, class T>
PYPERC_DEVICE Vector<T> read_cells(const Cells<T>& cells, const T* row) {
  if constexpr (WHOLE) {
    return load16(row + cells.base + cells.first);
  } else {
    Vector<T> v{};
    PYPERC_UNROLL
    for (int e = 0; e < cells.SIZE; ++e) {
      if (cells.column(e) < cells.columns) v.e[e] = row[cells.column(e)];
    }
    return v;
  }
}
template <bool WHOLE, class T>
PYPERC_DEVICE void write_cells(const Cells<T>& cells, T* row, const Vector<T>& v) {
  if constexpr (WHOLE) {
    store16(row + cells.base + cells.first, v);
  } else {
    PYPERC_UNROLL
    for (int e = 0; e < cells.SIZE; ++e) {
      if (cells.column(e) < cells.columns) row[cells.column(e)] = v.e[e];
    }
  }
}

// Elements in what they are computed in, and back.
template <class T>
PYPERC_DEVICE void widen(const Vector<T>& v, Wide<T> (&wide)[Vector<T>::SIZE]) {
  PYPERC_UNROLL
  for (int e = 0; e < Vector<T>::SIZE; ++e) wide[e] = widen(v.e[e]);
}
template <class T>
PYPERC_DEVICE Vector<T> narrow_all(const Wide<T> (&wide)[Vector<T>::SIZE]) {
  Vector<T> v;
  if constexpr (sizeof(T) == 2) {
    PYPERC_UNROLL
    for (int e = 0; e < Vector<T>::SIZE; e += 2) {
      const uint32_t pair = narrow_pair<T>(wide[e], wide[e + 1]);
      v.e[e].bits = static_cast<uint16_t>(pair);
      v.e[e + 1].bits = static_cast<uint16_t>(pair >> 16);
    }
  } else {
    PYPERC_UNROLL
    for (int e = 0; e < Vector<T>::SIZE; ++e) v.e[e] = wide[e];
  }
  return v;
}

template <class A, bool WHOLE, class T>
PYPERC_DEVICE void activate_rows(const Activate<T>& g, const Cells<T>& cells) {
  constexpr int SIZE = Vector<T>::SIZE, ROWS_AT_ONCE = WHOLE ? LOADS_AT_ONCE : 1;
  for (int64_t i = cells.row; i < cells.end; i += ROWS_AT_ONCE * cells.rows_apart) {
    Vector<T> in[ROWS_AT_ONCE];
    PYPERC_UNROLL
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      const int64_t row = i + r * cells.rows_apart;
      if (row < cells.end) in[r] = read_cells<WHOLE>(cells, g.s + row * g.ld_s);
    }
    PYPERC_UNROLL
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      const int64_t row = i + r * cells.rows_apart;
      if (row >= cells.end) break;
      Wide<T> x[SIZE];
      widen(in[r], x);
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) x[e] = A::f(Value<Wide<T>>(x[e]), g.parameters).v;
      write_cells<WHOLE>(cells, g.x + row * g.ld_x, narrow_all<T>(x));
    }
  }
}

template <class T, class A>
PYPERC_KERNEL(ELEMENTWISE_THREADS, ACTIVATE_BLOCKS<T>)
activate_kernel(PYPERC_PARAMETER Activate<T> g, PYPERC_PARAMETER Tiling tiling) {
  const Cells<T> cells(tiling, g.rows, g.columns);
  if (cells.whole) {
    activate_rows<A, true>(g, cells);
  } else {
    activate_rows<A, false>(g, cells);
  }
}

template <class A, bool WHOLE, class T>
PYPERC_DEVICE void differentiate_rows(const Differentiate<T>& g, const Cells<T>& cells,
                                      Wide<T> (&sums)[Vector<T>::SIZE]) {
  constexpr int SIZE = Vector<T>::SIZE, ROWS_AT_ONCE = WHOLE ? LOADS_AT_ONCE / 2 : 1;
  for (int64_t i = cells.row; i < cells.end; i += ROWS_AT_ONCE * cells.rows_apart) {
    Vector<T> dx[ROWS_AT_ONCE], saved[ROWS_AT_ONCE];
    PYPERC_UNROLL
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      const int64_t row = i + r * cells.rows_apart;
      if (row >= cells.end) break;
      dx[r] = read_cells<WHOLE>(cells, g.dx + row * g.ld_dx);
      if constexpr (A::saved != Saved::Nothing) saved[r] = read_cells<WHOLE>(cells, g.saved + row * g.ld_saved);
    }
    PYPERC_UNROLL
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      const int64_t row = i + r * cells.rows_apart;
      if (row >= cells.end) break;
      Wide<T> ds[SIZE], s[SIZE];
      widen(dx[r], ds);
      widen(A::saved != Saved::Nothing ? saved[r] : dx[r], s);
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) {
        ds[e] = A::backward(Value<Wide<T>>(ds[e]), Value<Wide<T>>(s[e]), g.parameters).v;
        sums[e] += ds[e];
      }
      if (g.ds) write_cells<WHOLE>(cells, g.ds + row * g.ld_ds, narrow_all<T>(ds));
      if constexpr (A::saved == Saved::Summation) {
        if (!g.x) continue;
        PYPERC_UNROLL
        for (int e = 0; e < SIZE; ++e) s[e] = A::f(Value<Wide<T>>(s[e]), g.parameters).v;
        write_cells<WHOLE>(cells, g.x + row * g.ld_x, narrow_all<T>(s));
      }
    }
  }
}

// The threads' sums over the rows of the block, into one row of partial sums: first the lanes of a warp that have the
// same columns, then the warps.
template <class T>
PYPERC_DEVICE void reduce_columns(const Cells<T>& cells, const Tiling& tiling, Wide<T> (&sums)[Vector<T>::SIZE],
                                  Wide<T>* partial) {
  constexpr int SIZE = Vector<T>::SIZE;
  auto* shared = reinterpret_cast<Wide<T>*>(shared_memory());
  const int lanes = tiling.lanes(), width = lanes * SIZE;
  for (int mask = lanes; mask < WARP; mask *= 2) {
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) sums[e] += warp_xor(sums[e], mask);
  }
  const int group = (lanes < WARP ? warp() : thread() >> tiling.lanes_log2) * width;
  if (lane() < lanes) {
    PYPERC_UNROLL
    for (int e = 0; e < SIZE; ++e) shared[group + cells.first + e * cells.step] = sums[e];
  }
  sync();
  const int groups = ELEMENTWISE_THREADS / (lanes < WARP ? WARP : lanes);
  for (int c = thread(); c < width && cells.base + c < cells.columns; c += ELEMENTWISE_THREADS) {
    Wide<T> sum = shared[c];
    for (int r = 1; r < groups; ++r) sum += shared[r * width + c];
    partial[cells.base + c] = sum;
  }
}

template <class T, class A>
PYPERC_KERNEL(ELEMENTWISE_THREADS, DIFFERENTIATE_BLOCKS<T>)
differentiate_kernel(PYPERC_PARAMETER Differentiate<T> g, PYPERC_PARAMETER Tiling tiling) {
  const Cells<T> cells(tiling, g.rows, g.columns);
  Wide<T> sums[Vector<T>::SIZE] = {};
  if (cells.whole) {
    differentiate_rows<A, true>(g, cells, sums);
  } else {
    differentiate_rows<A, false>(g, cells, sums);
  }
  if (g.db) {
    const auto row = static_cast<int64_t>(static_cast<uint32_t>(block()) / tiling.column_tiles);
    reduce_columns(cells, tiling, sums, static_cast<Wide<T>*>(g.workspace) + row * g.columns);
  }
}

// Fewer rows a block where there are few, more where each block leaves a row of partial sums.
template <class T>
Tiling make_tiling(int64_t rows, int64_t columns, bool aligned, int64_t most_row_tiles) {
  constexpr int SIZE = Vector<T>::SIZE, WIDEST = 5;
  Tiling tiling{};
  tiling.aligned = aligned;
  while (tiling.lanes_log2 < WIDEST && (SIZE << tiling.lanes_log2) < columns) ++tiling.lanes_log2;
  // Of a few long rows, a thread has one.
  while (tiling.lanes_log2 < 8 && (SIZE << tiling.lanes_log2) < columns &&
         (ELEMENTWISE_THREADS >> tiling.lanes_log2) > rows) {
    ++tiling.lanes_log2;
  }
  const int64_t apart = ELEMENTWISE_THREADS >> tiling.lanes_log2;
  tiling.column_tiles = static_cast<uint32_t>(divide_up(columns, SIZE << tiling.lanes_log2));
  constexpr int64_t FILLED = 512;  // blocks that keep every multiprocessor busy
  const bool many = divide_up(rows, apart * LOADS_AT_ONCE) * tiling.column_tiles >= FILLED;
  tiling.rows = many ? apart * LOADS_AT_ONCE : apart;
  const int64_t fewest = divide_up(divide_up(rows, std::max<int64_t>(1, most_row_tiles / tiling.column_tiles)), apart);
  tiling.rows = std::max(tiling.rows, fewest * apart);
  return tiling;
}

template <class T>
Tiling summed_tiling(int64_t rows, int64_t columns, bool aligned) {
  return make_tiling<T>(rows, columns, aligned, 1024);
}

// Whether every row begins at a multiple of 16 bytes; null does.
template <class T>
bool is_aligned(const T* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class T>
Status activate(const Activate<T>& g, Stream stream) {
  if (g.rows == 0 || g.columns == 0) return SUCCESS;
  const bool aligned = is_aligned(g.s, g.ld_s) && is_aligned(g.x, g.ld_x);
  const Tiling tiling = make_tiling<T>(g.rows, g.columns, aligned, INT32_MAX);
  const Grid grid{divide_up(g.rows, tiling.rows) * tiling.column_tiles, ELEMENTWISE_THREADS};
  switch (g.activation) {
#define X(A) \
  case Activation::A: return launch(activate_kernel<T, A>, grid, stream, g, tiling);
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  return SUCCESS;
}

template <class T>
size_t differentiate_workspace(int64_t rows, int64_t columns) {
  // The same tiles whether aligned or not.
  const Tiling tiling = summed_tiling<T>(rows, columns, true);
  return static_cast<size_t>(divide_up(rows, tiling.rows) * columns) * sizeof(Wide<T>);
}

template <class T>
Status differentiate(const Differentiate<T>& g, Stream stream) {
  if (g.columns == 0) return SUCCESS;
  const bool aligned = is_aligned(g.dx, g.ld_dx) && is_aligned(g.saved, g.ld_saved) && is_aligned(g.ds, g.ld_ds) &&
                       is_aligned(g.x, g.ld_x);
  const Tiling tiling = summed_tiling<T>(g.rows, g.columns, aligned);
  const int64_t row_tiles = divide_up(g.rows, tiling.rows);
  const size_t shared = g.db ? sizeof(Wide<T>) * Vector<T>::SIZE * ELEMENTWISE_THREADS : 0;
  const Grid grid{row_tiles * tiling.column_tiles, ELEMENTWISE_THREADS, shared};
  Status status = SUCCESS;
  switch (g.activation) {
#define X(A) \
  case Activation::A: status = launch(differentiate_kernel<T, A>, grid, stream, g, tiling); break;
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  if (status != SUCCESS || !g.db) return status;
  return sum_rows(static_cast<const Wide<T>*>(g.workspace), row_tiles, g.columns, g.db, stream);
}

#define PYPERC_ELEMENTWISE(T)                                   \
  template Status activate<T>(const Activate<T>&, Stream);      \
  template size_t differentiate_workspace<T>(int64_t, int64_t); \
  template Status differentiate<T>(const Differentiate<T>&, Stream);

}  // namespace pyperc::cuda
