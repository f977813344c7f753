// The list of optimisers at run time.
#pragma once

#include <string>
#include <vector>

#include "../core/optimizers.h"

namespace pyperc {

struct OptimizerInfo {
  std::string name;
  std::vector<Setting> settings;
  std::vector<std::string> states;
};
const std::vector<OptimizerInfo>& optimizer_list();  // in the order of enum Optimizer

// Throws c10::ValueError for an unknown name.
Optimizer optimizer_of(const std::string& name);

}  // namespace pyperc
