// A training step on the CPU: the loss of a batch, its gradient, and the update of the network, in one call.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace pyperc {

// A parameter and what its update needs.
template <class T>
struct Trained {
  T* data = nullptr;  // null: there is none
  int64_t ld = 0;
  T* state[MAX_STATES] = {};
  int64_t ld_state = 0;
  const double* settings = nullptr;  // null: the parameter stays as it is
  int64_t count = 0;                 // of this step, from 1
  T* gradient = nullptr;             // where it is wanted, contiguous, in place of the update
  bool wanted() const { return settings || gradient; }
};

template <class T>
struct StepLayer {
  LayerSpec spec;
  Trained<T> w, b;  // [out, in], [out]
  double dropout;   // probability with which elements of x(l) are dropped
};

enum class Reduction { Mean, Sum };

template <class T>
struct Objective {
  Loss loss;
  LossOver over;
  Parameters parameters;
  Reduction reduction;
  const T* class_weight = nullptr;
  double smoothing = 0;
  int64_t ignore_index = -100;
};

// Row i of a batch is row order[i] of x, y, target and weight; i itself where order is null.
template <class T>
struct Batch {
  int64_t size = 0;
  const int64_t* order = nullptr;
  int64_t rows = 0;  // of the data set
  const void* x = nullptr;
  Stored stored = Stored::Float32;
  Matrix<const T> x_strides;  // strides of x; other than unit ones only for T's own numbers without order
  const T *scale = nullptr, *shift = nullptr;  // [in]: x * scale + shift is read; both null: x
  const T* y = nullptr;                        // [rows, out], ld_y apart; or
  int64_t ld_y = 0;
  const int64_t* target = nullptr;  // [rows]
  const T* weight = nullptr;        // [rows], or null
};

enum class OnNan { Ignore, Stop };

template <class T>
struct Step {
  Batch<T> batch;
  const StepLayer<T>* layers;
  int depth;
  Objective<T> objective;
  Optimizer optimizer;
  double max_norm;  // of all gradients together, to which they are shortened; infinity: not even looked at
  OnNan on_nan;
  uint64_t seed;  // of dropout
};

enum class Outcome {
  Done,
  NanLoss,      // and nothing was changed
  WrongTarget,  // or row number; nothing was changed
};

struct StepResult {
  Outcome outcome;
  double loss;
  double norm;   // of all gradients, before they were shortened; NaN where max_norm is infinite
  int64_t kept;  // bytes of x(1) ... x(L) and s(l) that backward reads
  int64_t row;   // of the batch, whose target is wrong
};

// Bytes of workspace; 64-byte aligned memory is expected.
template <class T>
size_t step_workspace(const Kernels<T>& kernels, const Step<T>& step, const Parallel& parallel);
template <class T>
StepResult step(const Kernels<T>& kernels, const Step<T>& step, const Parallel& parallel, void* workspace,
                Memory& memory);

// How many state tensors the settings need.
int live_states(Optimizer optimizer, const double* settings);

}  // namespace pyperc
