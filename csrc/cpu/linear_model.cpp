// The passes of the linear models on the CPU.
#include "linear_model.h"

#include <algorithm>
#include <vector>

#include "pass.h"

namespace pyperc {

namespace {

// A parallel region costs a few microseconds, the time of about this many elements on one thread.
constexpr int64_t ELEMENTS_PER_THREAD = int64_t{1} << 15;

int threads_for(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / ELEMENTS_PER_THREAD, 1, threads));
}

// Rows whose gradients are summed before they go into the total: in float32 the error of the sum of n rows then grows
// with this and with n / CHUNK, not with n.
constexpr int64_t CHUNK = 1024;

template <class T>
int64_t gradient_size(const LinearRows<T>& pass) {
  return (pass.classes * (pass.columns + 1) + 15) / 16 * 16;
}

}  // namespace

template <class T>
int64_t objective_workspace(const LinearRows<T>& pass, int threads) {
  // A chunk's gradient and a thread's gradient, and the scores.
  return threads * (2 * gradient_size(pass) + LinearRows<T>::workspace_size(pass.classes));
}

template <class T>
void objective(const Kernels<T>& kernels, LinearRows<T>& pass, const Parallel& parallel, T* workspace) {
  const int64_t threads = threads_for(pass.rows * pass.columns * pass.classes, parallel.threads);
  const int64_t size = gradient_size(pass), weights = pass.classes * pass.columns;
  std::vector<double> values(static_cast<size_t>(threads), 0.0);
  const int64_t piece = 2 * size + LinearRows<T>::workspace_size(pass.classes);
  run(parallel, threads, [&](int64_t t) {
    T *total = workspace + t * piece, *chunk = total + size;
    std::fill(total, total + size, T(0));
    const int64_t begin = pass.rows * t / threads, end = pass.rows * (t + 1) / threads;
    for (int64_t i = begin; i < end; i += CHUNK) {
      std::fill(chunk, chunk + size, T(0));
      LinearRows<T> part = pass;
      part.rows = std::min(CHUNK, end - i);
      part.x += i * pass.ld;
      if (part.y) part.y += i;
      if (part.target) part.target += i;
      if (part.weight) part.weight += i;
      part.workspace = chunk + size;
      part.dw = chunk;
      part.db = chunk + weights;
      part.value = 0;
      kernels.linear_rows(part);
      values[static_cast<size_t>(t)] += part.value;
      for (int64_t j = 0; j < size; ++j) total[j] += chunk[j];
    }
  });
  pass.value = 0;
  std::fill(pass.dw, pass.dw + weights, T(0));
  std::fill(pass.db, pass.db + pass.classes, T(0));
  for (int64_t t = 0; t < threads; ++t) {
    const T* total = workspace + t * piece;
    pass.value += values[static_cast<size_t>(t)];
    for (int64_t j = 0; j < weights; ++j) pass.dw[j] += total[j];
    for (int64_t c = 0; c < pass.classes; ++c) pass.db[c] += total[weights + c];
  }
}

template <class T>
void perceptron_epoch(const Kernels<T>& kernels, PerceptronRows<T>* classes, int64_t count, const Parallel& parallel) {
  // Rows of a block: half of a second-level cache of 1 MB.
  const int64_t bytes = classes[0].ld * static_cast<int64_t>(sizeof(T));
  const int64_t begin = classes[0].begin, end = classes[0].end;
  const int64_t block = count == 1 ? std::max<int64_t>(1, end - begin)
                                   : std::max<int64_t>(16, (int64_t{1} << 19) / std::max<int64_t>(1, bytes));
  const int64_t threads = std::min<int64_t>(
      count, threads_for((end - begin) * (classes[0].columns + classes[0].products.count) * count, parallel.threads));
  run(parallel, threads, [&](int64_t t) {
    const int64_t first = count * t / threads, last = count * (t + 1) / threads;
    for (int64_t i = begin; i < end; i += block) {
      for (int64_t c = first; c < last; ++c) {
        classes[c].begin = i;
        classes[c].end = std::min(end, i + block);
        kernels.perceptron_rows(classes[c]);
      }
    }
  });
}

template <class T>
void loss(const Kernels<T>& kernels, Loss loss, LossBlock<T>& block, const Parallel& parallel) {
  const bool by_rows = block.target != nullptr;
  const int64_t n = by_rows ? block.rows : block.columns;
  const int64_t threads = threads_for(block.rows * block.columns, parallel.threads);
  std::vector<double> sums(static_cast<size_t>(threads), 0.0);
  run(parallel, threads, [&](int64_t t) {
    const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
    LossBlock<T> part = block;
    part.sum = 0;
    (by_rows ? part.rows : part.columns) = end - begin;
    part.s += begin * (by_rows ? block.ld_s : 1);
    if (part.y) part.y += begin;
    if (part.target) part.target += begin;
    if (part.weight) part.weight += begin;
    if (part.value) part.value += begin * (by_rows ? block.ld_value : 1);
    if (part.ds) part.ds += begin * (by_rows ? block.ld_ds : 1);
    kernels.losses[static_cast<int>(loss)](part);
    sums[static_cast<size_t>(t)] = part.sum;
  });
  block.sum = 0;
  for (const double sum : sums) block.sum += sum;
}

template int64_t objective_workspace(const LinearRows<float>&, int);
template int64_t objective_workspace(const LinearRows<double>&, int);
template void objective(const Kernels<float>&, LinearRows<float>&, const Parallel&, float*);
template void objective(const Kernels<double>&, LinearRows<double>&, const Parallel&, double*);
template void perceptron_epoch(const Kernels<float>&, PerceptronRows<float>*, int64_t, const Parallel&);
template void perceptron_epoch(const Kernels<double>&, PerceptronRows<double>*, int64_t, const Parallel&);
template void loss(const Kernels<float>&, Loss, LossBlock<float>&, const Parallel&);
template void loss(const Kernels<double>&, Loss, LossBlock<double>&, const Parallel&);

}  // namespace pyperc
