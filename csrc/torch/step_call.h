// The calls of a training step, as methods of its Python type.
#pragma once

#include "python.h"

namespace pyperc::train_step {

// step(x, y, weight=None): the loss; None where autograd has to take the step.
PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords);

PyObject* gradients(PyObject* self, PyObject* args);
PyObject* epoch(PyObject* self, PyObject* args, PyObject* keywords);

}  // namespace pyperc::train_step
