// The operators of the library pyperc: schemas, and the kernel of each dispatch key.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "autograd.h"
#include "derivatives.h"
#include "native.h"
#include "operators.h"

namespace pyperc {

namespace {

using composition::Kept;
using composition::Needs;
using Biases = c10::List<std::optional<Tensor>>;
using Names = c10::List<std::string>;

// The network in the form of the schema, and back.
struct Arguments {
  Tensors weights, biases;
  Chain chain;

  Arguments(at::TensorList w, const Biases& b, const Names& activations, c10::ArrayRef<double> parameters)
      : weights(w.vec()), chain(Chain::flat(names(activations), parameters)) {
    for (const std::optional<Tensor> bias : b) biases.push_back(bias.value_or(Tensor()));
  }
  Network network() const { return {weights, biases, chain}; }

  static std::vector<std::string> names(const Names& list) { return {list.begin(), list.end()}; }
  static Names names(const Chain& chain) {
    Names list;
    for (const std::string& name : chain.names()) list.push_back(name);
    return list;
  }
  static Biases optional(const Tensors& biases) {
    Biases list;
    for (const Tensor& b : biases) list.push_back(b.defined() ? std::optional<Tensor>(b) : std::nullopt);
    return list;
  }
};

// What mlp_forward returns and mlp_backward takes: layer by layer x(l), or s(l) where f' reads that; the output last.
Tensors pack(const Kept& kept, const Chain& chain) {
  Tensors list;
  for (size_t l = 0; l < chain.size(); ++l) {
    if (chain[l].saved() == Saved::Summation) list.push_back(kept.s[l]);
    if (composition::keeps_output(chain, l)) list.push_back(kept.x[l]);
  }
  return list;
}
Kept unpack(at::TensorList list, const Chain& chain) {
  Kept kept{Tensors(chain.size()), Tensors(chain.size())};
  size_t next = 0;
  for (size_t l = 0; l < chain.size(); ++l) {
    if (chain[l].saved() == Saved::Summation) kept.s[l] = list[next++];
    if (composition::keeps_output(chain, l)) kept.x[l] = list[next++];
  }
  return kept;
}

// The gradients that are wanted, one after the other; and back.
Tensors wanted(const Tensors& gradients) {
  Tensors list;
  for (const Tensor& t : gradients) {
    if (t.defined()) list.push_back(t);
  }
  return list;
}
Needs needs_of(const c10::List<bool>& flags, size_t depth) {
  TORCH_CHECK_VALUE(flags.size() == 1 + 2 * depth, "mlp_backward: needs must hold ", 1 + 2 * depth, " flags, got ",
                    flags.size());
  Needs needs(depth);
  needs.x = flags.get(0);
  for (size_t l = 0; l < depth; ++l) {
    needs.weights[l] = flags.get(1 + l);
    needs.biases[l] = flags.get(1 + depth + l);
  }
  return needs;
}

Tensor mlp_native(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                  c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  check(x, arguments.network());
  if (reason_for_aten(x, arguments.chain)) return composition::forward(x, arguments.network()).x.back();
  return native::forward(x, arguments.network(), nullptr);
}

Tensor mlp_composed(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                    c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  return composition::forward(x, arguments.network()).x.back();
}

Tensor mlp_differentiable(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                          c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  return mlp_autograd(x, arguments.network());
}

Tensors forward_native(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                       c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  check(x, arguments.network());
  TORCH_CHECK_VALUE(!reason_for_aten(x, arguments.chain), "mlp_forward: ", reason_for_aten(x, arguments.chain));
  Kept kept;
  native::forward(x, arguments.network(), &kept);
  // A schema promises shapes, not strides: what crosses the dispatcher is contiguous.
  for (Tensors* list : {&kept.x, &kept.s}) {
    for (Tensor& t : *list) {
      if (t.defined()) t = t.contiguous();
    }
  }
  return pack(kept, arguments.chain);
}

template <class F>
c10::TypedOperatorHandle<F> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}
const auto& forward_operator() {
  static const auto op = find_operator<decltype(forward_native)>("pyperc::mlp_forward");
  return op;
}
bool any_requires_grad(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.requires_grad(); });
}

Tensors forward_composed(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                         c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  return operators::composed_forward(x, arguments.network());
}

// What fits the kernels' reading of raw memory.
void check_backward(const Tensor& dy, const Tensor& x, at::TensorList weights, at::TensorList saved, const Chain& chain,
                    const c10::List<bool>& needs) {
  const size_t depth = weights.size();
  const Tensors no_biases(depth);
  check(x, {weights.vec(), no_biases, chain});
  const auto check_one = [&](const Tensor& t, const auto&... name) {
    TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type() && t.device() == x.device(), "mlp_backward: ", name...,
                     " must have x's dtype ", x.scalar_type(), " and device ", x.device(), ", got ", t.scalar_type(),
                     " on ", t.device());
  };
  const auto check_shape = [&](const Tensor& t, bool flat, const c10::SymInt& columns, const auto&... name) {
    std::vector<c10::SymInt> expected = x.sym_sizes().vec();
    if (flat) {
      c10::SymInt batch = 1;
      for (size_t d = 0; d + 1 < expected.size(); ++d) batch = batch * expected[d];
      expected = {batch, columns};
    }
    expected.back() = columns;
    TORCH_CHECK_VALUE(t.sym_sizes() == c10::SymIntArrayRef(expected), "mlp_backward: ", name..., " must be ",
                      c10::SymIntArrayRef(expected), ", got ", t.sym_sizes());
  };
  check_one(dy, "dy");
  check_shape(dy, false, weights.back().sym_size(0), "dy");
  // Layer by layer: rows of the batch, and the output in the shape of x.
  std::vector<std::pair<size_t, bool>> expected;
  for (size_t l = 0; l < depth; ++l) {
    if (chain[l].saved() == Saved::Summation) expected.emplace_back(l, true);
    if (composition::keeps_output(chain, l)) expected.emplace_back(l, l + 1 < depth);
  }
  TORCH_CHECK_VALUE(saved.size() == expected.size(), "mlp_backward: saved must hold the ", expected.size(),
                    " tensors that mlp_forward returns, got ", saved.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    check_one(saved[i], "saved[", i, "]");
    check_shape(saved[i], expected[i].second, weights[expected[i].first].sym_size(0), "saved[", i, "]");
  }
  needs_of(needs, depth);
}

Tensors backward_native(const Tensor& dy, const Tensor& x, at::TensorList weights, at::TensorList saved,
                        Names activations, c10::ArrayRef<double> parameters, c10::List<bool> needs) {
  const Chain chain = Chain::flat(Arguments::names(activations), parameters);
  check_backward(dy, x, weights, saved, chain, needs);
  TORCH_CHECK_VALUE(!reason_for_aten(x, chain), "mlp_backward: ", reason_for_aten(x, chain));
  std::vector<int64_t> sizes{weights[0].size(1)};
  for (const Tensor& w : weights) sizes.push_back(w.size(0));
  return wanted(native::backward(dy, x, sizes, weights.vec(), unpack(saved, chain), native::Release::Nothing, chain,
                                 needs_of(needs, weights.size())));
}

Tensors backward_composed(const Tensor& dy, const Tensor& x, at::TensorList weights, at::TensorList saved,
                          Names activations, c10::ArrayRef<double> parameters, c10::List<bool> needs) {
  return operators::composed_backward(dy, x, weights.vec(), saved.vec(),
                                      Chain::flat(Arguments::names(activations), parameters), needs.vec());
}

const auto& backward_operator() {
  static const auto op = find_operator<decltype(backward_native)>("pyperc::mlp_backward");
  return op;
}

// The halves have no node of their own: differentiated by themselves, they are their composition.
Tensors forward_autograd(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                         c10::ArrayRef<double> parameters) {
  const Tensors b = Arguments(weights, biases, activations, parameters).biases;
  if (c10::GradMode::is_enabled() && (x.requires_grad() || any_requires_grad(weights) || any_requires_grad(b))) {
    return forward_composed(x, weights, biases, activations, parameters);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return forward_operator().call(x, weights, biases, activations, parameters);
}

Tensors backward_autograd(const Tensor& dy, const Tensor& x, at::TensorList weights, at::TensorList saved,
                          Names activations, c10::ArrayRef<double> parameters, c10::List<bool> needs) {
  if (c10::GradMode::is_enabled() &&
      (dy.requires_grad() || x.requires_grad() || any_requires_grad(weights) || any_requires_grad(saved))) {
    return backward_composed(dy, x, weights, saved, activations, parameters, needs);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_operator().call(dy, x, weights, saved, activations, parameters, needs);
}

Tensor with_last(const Tensor& x, const c10::SymInt& last) {
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = last;
  return at::empty_symint(sizes, x.options());
}
Tensor rows(const Tensor& x, const c10::SymInt& columns) {
  c10::SymInt batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) batch = batch * x.sym_size(d);
  return at::empty_symint({batch, columns}, x.options());
}

Tensor mlp_meta(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  check(x, arguments.network());
  return with_last(x, weights.back().sym_size(0));
}

Tensors forward_meta(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                     c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  check(x, arguments.network());
  const size_t depth = weights.size();
  Kept kept{Tensors(depth), Tensors(depth)};
  for (size_t l = 0; l < depth; ++l) {
    const c10::SymInt out = weights[l].sym_size(0);
    kept.x[l] = l + 1 == depth ? with_last(x, out) : rows(x, out);
    if (arguments.chain[l].saved() == Saved::Summation) kept.s[l] = rows(x, out);
  }
  return pack(kept, arguments.chain);
}

Tensors backward_meta(const Tensor& dy, const Tensor& x, at::TensorList weights, at::TensorList saved,
                      Names activations, c10::ArrayRef<double> parameters, c10::List<bool> needs) {
  check_backward(dy, x, weights, saved, Chain::flat(Arguments::names(activations), parameters), needs);
  const Needs wanted = needs_of(needs, weights.size());
  Tensors gradients;
  if (wanted.x) gradients.push_back(at::empty_symint(x.sym_sizes(), x.options()));
  for (size_t l = 0; l < weights.size(); ++l) {
    if (wanted.weights[l]) gradients.push_back(at::empty_symint(weights[l].sym_sizes(), x.options()));
  }
  for (size_t l = 0; l < weights.size(); ++l) {
    if (wanted.biases[l]) gradients.push_back(at::empty_symint({weights[l].sym_size(0)}, x.options()));
  }
  return gradients;
}

// The derivatives with respect to x: kernels where nothing is to be recorded, else a composition, which has derivatives
// itself.
Tensor jacobian_of(const Tensor& x, at::TensorList weights, const Biases& biases, Names activations,
                   c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  return derivatives::jacobian(x, arguments.network());
}
std::tuple<Tensor, Tensor> vjp_of(const Tensor& x, const Tensor& dy, at::TensorList weights, const Biases& biases,
                                  Names activations, c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  return derivatives::vjp(x, dy, arguments.network());
}
std::tuple<Tensor, Tensor> jvp_of(const Tensor& x, const Tensor& dx, at::TensorList weights, const Biases& biases,
                                  Names activations, c10::ArrayRef<double> parameters) {
  const Arguments arguments(weights, biases, activations, parameters);
  return derivatives::jvp(x, dx, arguments.network());
}

Tensor activation_composed(const Tensor& x, const std::string& name, c10::ArrayRef<double> parameters) {
  TORCH_CHECK_TYPE(at::isFloatingType(x.scalar_type()), "activation: x must have a floating dtype, got ",
                   x.scalar_type());
  return composition::activation(x, Chain({name}, {parameters.vec()})[0]);
}

Tensor loss_composed(const Tensor& input, const Tensor& target, const std::string& name,
                     c10::ArrayRef<double> parameters) {
  return composition::loss(input, target, LossChoice(name, parameters));
}

}  // namespace

namespace operators {

Tensors composed_forward(const Tensor& x, const Network& network) {
  check(x, network);
  Kept kept = composition::forward(x, network);
  // What is kept beside the output has no leading dimensions.
  if (x.dim() != 2) {
    for (Tensors* list : {&kept.x, &kept.s}) {
      for (Tensor& t : *list) {
        if (t.defined() && &t != &kept.x.back()) t = x.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2);
      }
    }
  }
  return pack(kept, network.chain);
}

Tensors composed_backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const Tensors& saved,
                          const Chain& chain, const std::vector<bool>& needs) {
  c10::List<bool> flags;
  for (const bool need : needs) flags.push_back(need);
  check_backward(dy, x, weights, saved, chain, flags);
  return wanted(composition::backward(dy, x, weights, unpack(saved, chain), chain, needs_of(flags, weights.size())));
}

Tensor mlp(const Tensor& x, const Network& network) {
  static const auto op = find_operator<decltype(mlp_native)>("pyperc::mlp");
  return op.call(x, network.weights, Arguments::optional(network.biases), Arguments::names(network.chain),
                 network.chain.flat_parameters());
}

Kept mlp_forward(const Tensor& x, const Network& network) {
  return unpack(forward_operator().call(x, network.weights, Arguments::optional(network.biases),
                                        Arguments::names(network.chain), network.chain.flat_parameters()),
                network.chain);
}

Tensors mlp_backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const Kept& kept, const Chain& chain,
                     const Needs& needs) {
  const size_t depth = weights.size();
  c10::List<bool> flags;
  flags.push_back(needs.x);
  for (const bool need : needs.weights) flags.push_back(need);
  for (const bool need : needs.biases) flags.push_back(need);
  const Tensors list = backward_operator().call(dy, x, weights, pack(kept, chain), Arguments::names(chain),
                                                chain.flat_parameters(), flags);
  Tensors gradients(1 + 2 * depth);
  size_t next = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (flags.get(i)) gradients[i] = list[next++];
  }
  return gradients;
}

}  // namespace operators

TORCH_LIBRARY(pyperc, m) {
  m.def("mlp(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters) -> Tensor");
  m.def("mlp_forward(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters) -> Tensor[]");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] saved, str[] activations, float[] parameters, "
      "bool[] needs) -> Tensor[]");
  m.def("jacobian(Tensor x, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters) -> Tensor",
        jacobian_of);
  m.def(
      "vjp(Tensor x, Tensor dy, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters) -> "
      "(Tensor, Tensor)",
      vjp_of);
  m.def(
      "jvp(Tensor x, Tensor dx, Tensor[] weights, Tensor?[] biases, str[] activations, float[] parameters) -> "
      "(Tensor, Tensor)",
      jvp_of);
  m.def("activation(Tensor x, str name, float[] parameters) -> Tensor", activation_composed);
  m.def("loss(Tensor input, Tensor target, str name, float[] parameters) -> Tensor", loss_composed);
}

void implement(torch::Library& m) {
  m.impl("mlp", mlp_native);
  m.impl("mlp_forward", forward_native);
  m.impl("mlp_backward", backward_native);
}
TORCH_LIBRARY_IMPL(pyperc, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(pyperc, CUDA, m) { implement(m); }

TORCH_LIBRARY_IMPL(pyperc, Meta, m) {
  m.impl("mlp", mlp_meta);
  m.impl("mlp_forward", forward_meta);
  m.impl("mlp_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(pyperc, Autograd, m) {
  m.impl("mlp", mlp_differentiable);
  m.impl("mlp_forward", forward_autograd);
  m.impl("mlp_backward", backward_autograd);
}

// torch.func transforms and autocast see the layers' own operations.
TORCH_LIBRARY_IMPL(pyperc, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("mlp", mlp_composed);
  m.impl("mlp_forward", forward_composed);
  m.impl("mlp_backward", backward_composed);
  m.impl("jacobian", jacobian_of);
  m.impl("vjp", vjp_of);
  m.impl("jvp", jvp_of);
}
TORCH_LIBRARY_IMPL(pyperc, AutocastCPU, m) { m.impl("mlp", mlp_composed); }
TORCH_LIBRARY_IMPL(pyperc, AutocastCUDA, m) { m.impl("mlp", mlp_composed); }

}  // namespace pyperc
