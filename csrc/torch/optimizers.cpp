// The list of optimisers at run time.
#include "optimizers.h"

#include <c10/util/Exception.h>

namespace pyperc {

namespace {

template <class O>
OptimizerInfo describe() {
  OptimizerInfo info{O::name, {}, {}};
  for (const Setting& setting : O::settings) {
    if (setting.name) info.settings.push_back(setting);
  }
  for (const char* state : O::states) {
    if (state) info.states.emplace_back(state);
  }
  return info;
}

}  // namespace

const std::vector<OptimizerInfo>& optimizer_list() {
  static const std::vector<OptimizerInfo> list = {
#define X(O) describe<O>(),
      PYPERC_OPTIMIZERS(X)
#undef X
  };
  return list;
}

Optimizer optimizer_of(const std::string& name) {
  const auto& list = optimizer_list();
  std::string names;
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].name == name) return static_cast<Optimizer>(i);
    names += (names.empty() ? "" : ", ") + list[i].name;
  }
  TORCH_CHECK_VALUE(false, "step: optimizer must be one of ", names, "; got '", name, "'");
}

}  // namespace pyperc
