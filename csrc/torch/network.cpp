// The list of activations at run time, chains, and the checks of arguments.
#include "network.h"

#include <c10/util/Exception.h>

#include "backend.h"

namespace pyperc {

namespace {

template <class A>
ActivationInfo describe() {
  ActivationInfo info{A::name, {}, {}, A::saved};
  for (const Parameter& parameter : A::parameters) {
    if (!parameter.name) break;
    info.parameters.emplace_back(parameter.name);
    info.defaults.push_back(parameter.value);
  }
  return info;
}

LayerActivation make(const std::string& name, const double* parameters, size_t count) {
  const auto& list = activation_list();
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].name != name) continue;
    TORCH_CHECK_VALUE(count == list[i].parameters.size(), "activation: ", name, " takes ", list[i].parameters.size(),
                      " parameters (", c10::Join(", ", list[i].parameters), "), got ", count);
    LayerActivation layer{static_cast<Activation>(i), {}};
    std::copy(parameters, parameters + count, layer.parameters.value);
    TORCH_CHECK_VALUE(layer.activation != Activation::Hardtanh || !(parameters[0] > parameters[1]),
                      "activation: min_val of hardtanh must be at most max_val ", parameters[1], ", got ",
                      parameters[0]);
    return layer;
  }
  std::string names;
  for (const ActivationInfo& info : list) names += (names.empty() ? "" : ", ") + info.name;
  TORCH_CHECK_VALUE(false, "activation: must be one of ", names, "; got '", name, "'");
}

std::string dtype(const Tensor& t) { return "torch." + std::string(c10::getDtypeNames(t.scalar_type()).first); }

// The name is built only for an error.
struct Argument {
  const char* name;
  int64_t index;  // < 0: not a list
  friend std::ostream& operator<<(std::ostream& out, const Argument& a) {
    out << "mlp: " << a.name;
    if (a.index >= 0) out << "[" << a.index << "]";
    return out;
  }
};

void check_kind(const Tensor& t, const Argument& argument) {
  TORCH_CHECK_TYPE(t.defined(), argument, " must be a tensor, got None");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided && !t.is_nested(), argument,
                   " must be a dense strided tensor, got layout ", t.is_nested() ? c10::Layout::Jagged : t.layout());
  TORCH_CHECK_TYPE(!t.is_quantized() && at::isFloatingType(t.scalar_type()), argument,
                   " must have a floating dtype (float64, float32, bfloat16, float16), got ", dtype(t));
}

void check_like(const Tensor& t, const Tensor& x, const Argument& argument) {
  check_kind(t, argument);
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), argument, " must have x's dtype ", dtype(x), ", got ", dtype(t));
  TORCH_CHECK_TYPE(t.device() == x.device(), argument, " must be on x's device ", x.device(), ", got ", t.device());
}

}  // namespace

const std::vector<ActivationInfo>& activation_list() {
  static const std::vector<ActivationInfo> list = {
#define X(A) describe<A>(),
      PYPERC_ACTIVATIONS(X)
#undef X
  };
  return list;
}

bool LayerActivation::fusible() const {
  switch (activation) {
#define X(A) \
  case Activation::A: return A::fusible(parameters);
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  return false;
}

Chain::Chain(const std::vector<std::string>& names, const std::vector<std::vector<double>>& parameters)
    : fusible_(true) {
  TORCH_CHECK_VALUE(names.size() == parameters.size(), "activations: ", names.size(), " names but ", parameters.size(),
                    " lists of parameters");
  for (size_t l = 0; l < names.size(); ++l) {
    layers_.push_back(make(names[l], parameters[l].data(), parameters[l].size()));
    fusible_ = fusible_ && layers_.back().fusible();
  }
}

Chain Chain::flat(c10::ArrayRef<std::string> names, c10::ArrayRef<double> parameters) {
  std::vector<std::vector<double>> lists;
  size_t used = 0;
  for (const std::string& name : names) {
    size_t count = 0;
    for (const ActivationInfo& info : activation_list()) {
      if (info.name == name) count = info.parameters.size();
    }
    TORCH_CHECK_VALUE(used + count <= parameters.size(), "parameters: ", name, " takes ", count, ", but ",
                      parameters.size() - used, " are left of ", parameters.size());
    lists.emplace_back(parameters.begin() + used, parameters.begin() + used + count);
    used += count;
  }
  TORCH_CHECK_VALUE(used == parameters.size(), "parameters: the activations take ", used, ", got ", parameters.size());
  return {names.vec(), lists};
}

std::vector<std::string> Chain::names() const {
  std::vector<std::string> names;
  for (const LayerActivation& layer : layers_) names.push_back(layer.info().name);
  return names;
}

std::vector<std::vector<double>> Chain::parameters() const {
  std::vector<std::vector<double>> lists;
  for (const LayerActivation& layer : layers_) {
    lists.emplace_back(layer.parameters.value, layer.parameters.value + layer.info().parameters.size());
  }
  return lists;
}

std::vector<double> Chain::flat_parameters() const {
  std::vector<double> flat;
  for (const std::vector<double>& list : parameters()) flat.insert(flat.end(), list.begin(), list.end());
  return flat;
}

void check(const Tensor& x, const Network& network) {
  const Tensors& weights = network.weights;
  const Tensors& biases = network.biases;
  TORCH_CHECK_VALUE(!weights.empty(), "mlp: weights must hold at least one weight, got none");
  TORCH_CHECK_VALUE(biases.size() == weights.size(),
                    "mlp: biases must hold one entry (a tensor or None) for each of the ", weights.size(),
                    " weights, got ", biases.size());
  TORCH_CHECK_VALUE(network.chain.size() == weights.size(), "mlp: activations must hold one entry for each of the ",
                    weights.size(), " weights, got ", network.chain.size());
  check_kind(x, {"x", -1});
  TORCH_CHECK_VALUE(x.dim() >= 1, "mlp: x must have at least one dimension, got a tensor of shape []");
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& w = weights[l];
    const Argument argument{"weights", static_cast<int64_t>(l)};
    check_like(w, x, argument);
    TORCH_CHECK_VALUE(w.dim() == 2, argument, " must be [out_features, in_features], got ", w.sym_sizes());
    if (l == 0) {
      TORCH_CHECK_VALUE(x.sym_sizes().back() == w.sym_size(1), "mlp: x must be [..., ", w.sym_size(1),
                        "] to fit weights[0] ", w.sym_sizes(), ", got ", x.sym_sizes());
    } else {
      TORCH_CHECK_VALUE(w.sym_size(1) == weights[l - 1].sym_size(0), argument, " must be [*, ",
                        weights[l - 1].sym_size(0), "] to follow weights[", l - 1, "] ", weights[l - 1].sym_sizes(),
                        ", got ", w.sym_sizes());
    }
    const Tensor& b = biases[l];
    if (b.defined()) {
      const Argument name{"biases", static_cast<int64_t>(l)};
      check_like(b, x, name);
      TORCH_CHECK_VALUE(b.dim() == 1 && b.sym_size(0) == w.sym_size(0), name, " must be [", w.sym_size(0),
                        "] to fit weights[", l, "] ", w.sym_sizes(), ", got ", b.sym_sizes());
    }
  }
}

const char* reason_for_aten(const Tensor& x, const Chain& chain) {
  const Backend* backend = find_backend(x.device().type());
  if (!backend) return "no kernels for this device";
  if (const char* reason = backend->reason(x.device())) return reason;
  if (!visit(x.scalar_type(), [](auto) {})) return "no kernels for this dtype";
  if (!chain.fusible()) return "an activation's parameters: its derivative cannot be read from its output";
  return nullptr;
}

Tensor contiguous_bias(const Tensor& b) {
  if (!b.defined()) return b;
  return (b.is_neg() ? b.resolve_neg() : b).contiguous();
}

}  // namespace pyperc
