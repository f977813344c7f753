// The list of losses at run time.
#include "losses.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace pyperc {

namespace {

template <class L>
LossInfo describe() {
  LossInfo info{L::name, {}, {}, L::over};
  for (const Parameter& parameter : L::parameters) {
    if (!parameter.name) break;
    info.parameters.emplace_back(parameter.name);
    info.defaults.push_back(parameter.value);
  }
  return info;
}

}  // namespace

const std::vector<LossInfo>& loss_list() {
  static const std::vector<LossInfo> list = {
#define X(L) describe<L>(),
      PYPERC_LOSSES(X)
#undef X
  };
  return list;
}

LossChoice::LossChoice(const std::string& name, c10::ArrayRef<double> values) : parameters{} {
  const auto& list = loss_list();
  const auto found = std::find_if(list.begin(), list.end(), [&](const LossInfo& info) { return info.name == name; });
  if (found == list.end()) {
    std::string names;
    for (const LossInfo& info : list) names += (names.empty() ? "" : ", ") + info.name;
    TORCH_CHECK_VALUE(false, "loss: must be one of ", names, "; got '", name, "'");
  }
  TORCH_CHECK_VALUE(values.size() == found->parameters.size(), "loss: ", name, " takes ", found->parameters.size(),
                    " parameters (", c10::Join(", ", found->parameters), "), got ", values.size());
  loss = static_cast<Loss>(found - list.begin());
  std::copy(values.begin(), values.end(), parameters.value);
}

}  // namespace pyperc
