// A training step as it is made, from the arguments of its Python type.
#pragma once

#include <memory>

#include "step_state.h"

namespace pyperc::train_step {

// Null, with Python's error set, where the arguments are not those of Step; throws where they do not fit together.
std::unique_ptr<State> new_state(PyObject* args, PyObject* keywords);

}  // namespace pyperc::train_step
