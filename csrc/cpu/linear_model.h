// The passes of the linear models on the CPU: who computes which rows, and in which order sums are added.
#pragma once

#include "kernels.h"

namespace pyperc {

// As LinearRows, over all rows: dw, db and value are set. Rows are shared out in blocks, one a thread, and the threads'
// sums are added in their order. `workspace`: objective_workspace elements, 64-byte aligned.
template <class T>
int64_t objective_workspace(const LinearRows<T>& pass, int threads);
template <class T>
void objective(const Kernels<T>& kernels, LinearRows<T>& pass, const Parallel& parallel, T* workspace);

// One epoch of the perceptron algorithm for several classes, each one's weights and counters in `classes`, over the
// rows [begin, end) of the order. Threads share out the classes; a block of rows is read from memory once for all
// classes of a thread.
template <class T>
void perceptron_epoch(const Kernels<T>& kernels, PerceptronRows<T>* classes, int64_t count, const Parallel& parallel);

// Value and derivative of a loss over n elements or rows; blocks are shared out, their sums added in order.
template <class T>
void loss(const Kernels<T>& kernels, Loss loss, LossBlock<T>& block, const Parallel& parallel);

}  // namespace pyperc
