// The per-call check of a fused run of modules, and its call: what pyperc.runs.Run keeps.
#pragma once

#include "python.h"

namespace pyperc {

// Adds the type `Run` to the module; returns false with a Python error set where that fails.
bool add_run_type(PyObject* module);

}  // namespace pyperc
