// The second pass of sums that blocks have begun: partial sums are added up in a fixed order.
#pragma once

#include "launch.cuh"

namespace pyperc::cuda {

// y[j] = the sum over i of partial[i, j]: 32 columns a block, the rows shared by its warps.
constexpr int SUM_THREADS = 1024;

template <class T>
PYPERC_KERNEL(SUM_THREADS, 1)
sum_rows_kernel(const Wide<T>* partial, int64_t rows, int64_t columns, T* y) {
  auto* shared = reinterpret_cast<Wide<T>*>(shared_memory());
  const int64_t column = block() * WARP + lane();
  Wide<T> sum = 0;
  if (column < columns) {
    for (int64_t i = warp(); i < rows; i += SUM_THREADS / WARP) sum += partial[i * columns + column];
  }
  shared[thread()] = sum;
  sync();
  if (warp() || column >= columns) return;
  for (int w = 1; w < SUM_THREADS / WARP; ++w) sum += shared[w * WARP + lane()];
  y[column] = narrow<T>(sum);
}

template <class T>
Status sum_rows(const Wide<T>* partial, int64_t rows, int64_t columns, T* y, Stream stream) {
  const Grid grid{divide_up(columns, WARP), SUM_THREADS, SUM_THREADS * sizeof(Wide<T>)};
  return launch(sum_rows_kernel<T>, grid, stream, partial, rows, columns, y);
}

// c = the sum of `splits` matrices [m, n] that lie one after the other: an element a thread.
constexpr int SPLIT_THREADS = 256;

template <class T>
PYPERC_KERNEL(SPLIT_THREADS, 4)
sum_splits_kernel(const Wide<T>* partial, int64_t splits, int64_t m, int64_t n, T* c, int64_t ldc) {
  const int64_t size = m * n, e = block() * SPLIT_THREADS + thread();
  if (e >= size) return;
  Wide<T> sum = partial[e];
  for (int64_t s = 1; s < splits; ++s) sum += partial[s * size + e];
  c[e / n * ldc + e % n] = narrow<T>(sum);
}

template <class T>
Status sum_splits(const Wide<T>* partial, int64_t splits, int64_t m, int64_t n, T* c, int64_t ldc, Stream stream) {
  return launch(sum_splits_kernel<T>, {divide_up(m * n, SPLIT_THREADS), SPLIT_THREADS}, stream, partial, splits, m, n,
                c, ldc);
}

}  // namespace pyperc::cuda
