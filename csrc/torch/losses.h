// The list of losses at run time.
#pragma once

#include <c10/util/ArrayRef.h>

#include <string>
#include <vector>

#include "../core/losses.h"

namespace pyperc {

struct LossInfo {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<double> defaults;
  LossOver over;
};
const std::vector<LossInfo>& loss_list();  // in the order of enum Loss

// Throws c10::ValueError for an unknown name or a wrong count of parameters.
struct LossChoice {
  Loss loss;
  Parameters parameters;

  LossChoice(const std::string& name, c10::ArrayRef<double> values);
  LossOver over() const { return loss_list()[static_cast<size_t>(loss)].over; }
};

}  // namespace pyperc
