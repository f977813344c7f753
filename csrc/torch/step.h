// The training step as a Python type: what pyperc.step.TrainStep keeps.
#pragma once

#include "python.h"

namespace pyperc {

// Adds the type `Step` to the module; returns false with a Python error set where that fails.
bool add_step_type(PyObject* module);

}  // namespace pyperc
