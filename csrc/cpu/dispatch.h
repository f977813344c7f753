// Which ISA runs: the best that the processor has, unless PYPERC_ISA names another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pyperc {

// Ascending: each one is preferred to those before it.
const std::vector<const Isa*>& isas_built();
std::vector<const Isa*> isas_here();

// Throws std::runtime_error, with the names that would do, where PYPERC_ISA cannot be obeyed.
const Isa& isa();

// Throws std::invalid_argument for a name that is not built or that this processor lacks.
void use_isa(const std::string& name);

}  // namespace pyperc
