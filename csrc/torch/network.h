// A network as torch sees it: its tensors, and the activations of its layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "../core/activations.h"
#include "../core/half.h"

namespace pyperc {

using at::Tensor;
using Tensors = std::vector<Tensor>;

// The dtypes that the kernels know: torch's name and the type that stands for it in the kernels.
#define PYPERC_DTYPES(X) \
  X(Float, float)        \
  X(Double, double)      \
  X(BFloat16, BFloat16)  \
  X(Half, Half)

// f(T{}) with the type of that dtype; false where the list has none.
template <class F>
bool visit(at::ScalarType dtype, F f) {
  switch (dtype) {
#define X(NAME, T) \
  case at::ScalarType::NAME: f(T{}); return true;
    PYPERC_DTYPES(X)
#undef X
    default: return false;
  }
}

struct ActivationInfo {
  std::string name;
  std::vector<std::string> parameters;
  std::vector<double> defaults;
  Saved saved;
};
const std::vector<ActivationInfo>& activation_list();  // in the order of enum Activation

// The activation of one layer. `chain` throws c10::ValueError for an unknown name or a wrong count of parameters.
struct LayerActivation {
  Activation activation;
  Parameters parameters;

  const ActivationInfo& info() const { return activation_list()[static_cast<size_t>(activation)]; }
  Saved saved() const { return info().saved; }
  bool fusible() const;
};

// The activations of a network, layer by layer.
class Chain {
 public:
  Chain(const std::vector<std::string>& names, const std::vector<std::vector<double>>& parameters);
  // The form of the operators' schema: all layers' parameters one after the other.
  static Chain flat(c10::ArrayRef<std::string> names, c10::ArrayRef<double> parameters);

  size_t size() const { return layers_.size(); }
  const LayerActivation& operator[](size_t l) const { return layers_[l]; }
  bool fusible() const { return fusible_; }

  std::vector<std::string> names() const;
  std::vector<std::vector<double>> parameters() const;
  std::vector<double> flat_parameters() const;

 private:
  std::vector<LayerActivation> layers_;
  bool fusible_;
};

// An undefined tensor in `biases` stands for none.
struct Network {
  const Tensors& weights;
  const Tensors& biases;
  const Chain& chain;

  size_t depth() const { return weights.size(); }
};

// Throws c10::TypeError or c10::ValueError that names the argument, what was expected and what came.
void check(const Tensor& x, const Network& network);

// A bias, or none, as the kernels read it. torch's fallback for lazy negation resolves tensors and lists of them, but
// no list of tensors that may be missing.
Tensor contiguous_bias(const Tensor& b);

// Why the kernels cannot run this and ATen does; null where they can.
const char* reason_for_aten(const Tensor& x, const Chain& chain);

}  // namespace pyperc
