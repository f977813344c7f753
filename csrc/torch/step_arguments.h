// What a call of a training step is given: from Python's arguments to the batch that the kernels read.
#pragma once

#include "step_state.h"

namespace pyperc::train_step {

struct Arguments {
  Tensor x, y, weight;  // what was given, or copies of it that the kernels can read
  bool probabilities = false;
};

// Throws where the object is none.
const Tensor& tensor(PyObject* object, const char* name);

// x, y and weight, of any number of leading dimensions, as [batch, in], [batch, out] or [batch], and [batch].
Arguments arguments_of(const State& state, PyObject* x, PyObject* y, PyObject* weight);

// Reads a's tensors in place, or copies of them that a keeps.
template <class S>
Batch<S> batch_of(const State& state, Arguments& a);

}  // namespace pyperc::train_step
