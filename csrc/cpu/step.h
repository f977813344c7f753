// A training step on the CPU: the loss of a batch, its gradient, and the update of the network, in one call.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace pyperc {

// A parameter stored as S, and what its update needs.
template <class S>
struct Trained {
  S* data = nullptr;  // null: there is none
  int64_t ld = 0;
  Wide<S>* master = nullptr;  // what is updated, contiguous, and then rounded into data; null: data itself
  Wide<S>* state[MAX_STATES] = {};
  int64_t ld_state = 0;
  const double* settings = nullptr;  // null: the parameter stays as it is
  int64_t count = 0;                 // of this step, from 1
  S* gradient = nullptr;             // where it is wanted, contiguous, in place of the update
  bool wanted() const { return settings || gradient; }
};

template <class S>
struct StepLayer {
  LayerSpec spec;
  Trained<S> w, b;  // [out, in], [out]
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
template <class S>
struct Batch {
  int64_t size = 0;
  const int64_t* order = nullptr;
  int64_t rows = 0;  // of the data set
  const void* x = nullptr;
  Stored stored = Stored::Float32;
  int64_t rs = 0, cs = 1;                           // of x; cs = 1 but where x is read in place
  const Wide<S>*scale = nullptr, *shift = nullptr;  // [in]: x * scale + shift is read; both null: x
  const S* y = nullptr;                             // [rows, out], ld_y apart; or
  int64_t ld_y = 0;
  const int64_t* target = nullptr;  // [rows]
  const S* weight = nullptr;        // [rows], or null
};

enum class OnNan { Ignore, Stop };

template <class S>
struct Step {
  Batch<S> batch;
  const StepLayer<S>* layers;
  int depth;
  Objective<Wide<S>> objective;
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

template <class S>
using KernelsOf = std::conditional_t<std::is_same_v<S, Wide<S>>, Kernels<S>, HalfKernels<S>>;

// Forward and backward run in S, loss and update in the wide format. Dropout is for S that are computed in.
template <class S>
StepResult step(const KernelsOf<S>& kernels, const Kernels<Wide<S>>& wide, const Step<S>& step,
                const Parallel& parallel, Memory& memory);

// How many state tensors the settings need.
int live_states(Optimizer optimizer, const double* settings);

}  // namespace pyperc
