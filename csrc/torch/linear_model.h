// The losses and the passes of the linear models, as the Python module offers them.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace pyperc {

void register_linear_model(pybind11::module_& m);

}  // namespace pyperc
