// The autograd node of a network, and the choice between kernels, dispatcher and composition.
#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>

#include "native.h"
#include "operators.h"

namespace pyperc {

namespace {

using composition::Kept;
using composition::Needs;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// torch holds nodes by shared_ptr or by intrusive_ptr, by version: the edge says which.
using NodePointer = decltype(torch::autograd::Edge::function);

template <class N, class P>
struct MakeNode {  // intrusive_ptr
  template <class... Arguments>
  static auto make(Arguments&&... arguments) {
    return c10::make_intrusive<N>(std::forward<Arguments>(arguments)...);
  }
};
template <class N>
struct MakeNode<N, std::shared_ptr<Node>> {
  template <class... Arguments>
  static auto make(Arguments&&... arguments) {
    // deleteNode, found beside Node where torch has it, frees a long graph without recursion.
    return std::shared_ptr<N>(new N(std::forward<Arguments>(arguments)...), [](N* node) { deleteNode(node); });
  }
};

// Whether nothing but autograd stands between tensors with these keys and the CPU kernels: no torch.func transform, no
// autocast, no mode or subclass with __torch_dispatch__, no lazy negation.
bool is_plain(c10::DispatchKeySet keys) {
  using c10::DispatchKey;
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet expected({DispatchKey::Dense, DispatchKey::AutogradFunctionality,
                                      DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  const c10::DispatchKeySet others = ((keys | local.included_) - local.excluded_) - expected;
  return others.highestFunctionalityKey() == DispatchKey::Undefined;
}

c10::DispatchKeySet keys_of(const Tensor& t) { return t.defined() ? t.key_set() : c10::DispatchKeySet(); }
c10::DispatchKeySet keys_of(const Tensors& list) {
  c10::DispatchKeySet keys;
  for (const Tensor& t : list) keys = keys | keys_of(t);
  return keys;
}

bool any_requires_grad(const Tensor& x, const Network& network) {
  if (!c10::GradMode::is_enabled()) return false;
  if (x.requires_grad()) return true;
  for (const Tensor& w : network.weights) {
    if (w.requires_grad()) return true;
  }
  for (const Tensor& b : network.biases) {
    if (b.defined() && b.requires_grad()) return true;
  }
  return false;
}

bool any_tangent(const Tensor& x, const Network& network) {
  if (!torch::autograd::ForwardADLevel::try_get_by_idx(0)) return false;
  const auto has = [](const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); };
  if (has(x)) return true;
  for (size_t l = 0; l < network.depth(); ++l) {
    if (has(network.weights[l]) || has(network.biases[l])) return true;
  }
  return false;
}

class MlpBackward : public Node {
 public:
  explicit MlpBackward(const Chain& chain) : chain_(chain) {}

  std::string name() const override { return "MlpBackward"; }

  void save(const Tensor& x, const Network& network, const Kept& kept) {
    const size_t depth = chain_.size();
    sizes_.push_back(network.weights[0].sym_size(1));
    x_ = SavedVariable(x, false);
    weights_.reserve(depth);
    biases_.reserve(depth);
    outputs_.reserve(depth);
    summations_.reserve(depth);
    for (size_t l = 0; l < depth; ++l) {
      sizes_.push_back(network.weights[l].sym_size(0));
      weights_.emplace_back(network.weights[l], false);
      biases_.emplace_back(network.biases[l], false);
      has_bias_.push_back(network.biases[l].defined());
      // The output is kept only where f' reads it: where not, changing it in place does no harm.
      const bool output = l + 1 == depth;
      const bool read = !output || chain_[l].saved() == Saved::Output;
      outputs_.emplace_back(read ? kept.x[l] : Tensor(), output);
      summations_.emplace_back(kept.s[l], false);
    }
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    x_.reset_data();
    for (auto* list : {&weights_, &biases_, &outputs_, &summations_}) {
      for (SavedVariable& saved : *list) saved.reset_data();
    }
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t depth = chain_.size();
    const Tensor& dy = grads[0];
    if (!dy.defined()) return variable_list(1 + 2 * depth);
    Needs needs(depth);
    needs.x = task_should_compute_output(0);
    size_t lowest = needs.x ? 0 : depth;
    for (size_t l = depth; l-- > 0;) {
      needs.weights[l] = task_should_compute_output(1 + l);
      needs.biases[l] = has_bias_[l] && task_should_compute_output(1 + depth + l);
      if (needs.weights[l] || needs.biases[l]) lowest = std::min(lowest, l);
    }
    if (lowest == depth) return variable_list(1 + 2 * depth);

    // Only what is read is unpacked, as in torch: a parameter that is not read may have been changed in place since.
    Tensors weights(depth);
    for (size_t l = 0; l < depth; ++l) {
      if (l > lowest || needs.x) weights[l] = weights_[l].unpack();
    }
    if (c10::GradMode::is_enabled()) return differentiable(dy, std::move(weights), needs);

    Kept kept{Tensors(depth), Tensors(depth)};
    for (size_t l = 0; l < depth; ++l) {
      const bool as_input = l + 1 < depth && needs.weights[l + 1];
      const bool as_saved = l >= lowest && chain_[l].saved() == Saved::Output;
      if (as_input || as_saved) kept.x[l] = l + 1 < depth ? outputs_[l].unpack() : outputs_[l].unpack(getptr());
      if ((as_input || l >= lowest) && chain_[l].saved() == Saved::Summation) kept.s[l] = summations_[l].unpack();
    }
    const Tensor x = needs.weights[0] ? x_.unpack() : Tensor();
    const c10::DispatchKeySet keys = dy.key_set() | keys_of(x) | keys_of(weights) | keys_of(kept.x) | keys_of(kept.s);
    if (is_plain(keys)) {
      std::vector<int64_t> sizes;
      for (const c10::SymInt& size : sizes_) sizes.push_back(size.expect_int());
      return native::backward(dy, x, sizes, weights, kept, chain_, needs);
    }
    // A tracer is shown the operator; a batch of dy (vmap over the backward pass) needs ATen's own rules.
    const bool batched = keys.has(c10::DispatchKey::FuncTorchBatched) || keys.has(c10::DispatchKey::Batched);
    if (batched) return composition::backward(dy, x, weights, kept, chain_, needs);
    for (size_t l = 0; l < depth; ++l) {
      // The operator takes whole lists; dy stands for the output where that was not kept, as nothing reads it.
      if (!weights[l].defined()) weights[l] = weights_[l].unpack();
      if (!kept.x[l].defined()) kept.x[l] = l + 1 < depth ? outputs_[l].unpack() : outputs_[l].unpack(getptr());
      if (!kept.x[l].defined()) kept.x[l] = dy;
      if (!kept.s[l].defined() && chain_[l].saved() == Saved::Summation) kept.s[l] = summations_[l].unpack();
    }
    return operators::mlp_backward(dy, x_.unpack(), weights, kept, chain_, needs);
  }

 private:
  // Under create_graph: the gradients as functions of dy, x, w and b, so that they have derivatives of any order.
  variable_list differentiable(const Tensor& dy, Tensors weights, const Needs& needs) const {
    Tensors biases;
    for (size_t l = 0; l < weights.size(); ++l) {
      if (!weights[l].defined()) weights[l] = weights_[l].unpack();
      biases.push_back(has_bias_[l] ? biases_[l].unpack() : Tensor());
    }
    const Tensor x = x_.unpack();
    const Kept kept = composition::forward(x, {weights, biases, chain_});
    return composition::backward(dy, x, weights, kept, chain_, needs);
  }

  const Chain chain_;
  std::vector<c10::SymInt> sizes_;
  SavedVariable x_;
  std::vector<SavedVariable> weights_, biases_, outputs_, summations_;
  std::vector<bool> has_bias_;
};

Tensor with_node(const Tensor& x, const Network& network, bool plain) {
  const auto node = MakeNode<MlpBackward, NodePointer>::make(network.chain);
  torch::autograd::edge_list edges;
  edges.reserve(1 + 2 * network.depth());
  const auto edge = [&](const Tensor& t) {
    edges.push_back(t.defined() ? torch::autograd::impl::gradient_edge(t) : torch::autograd::Edge());
  };
  edge(x);
  for (const Tensor& w : network.weights) edge(w);
  for (const Tensor& b : network.biases) edge(b);
  node->set_next_edges(std::move(edges));
  Kept kept;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (plain) {
      native::forward(x, network, &kept);
    } else {
      kept = operators::mlp_forward(x, network);
    }
  }
  const Tensor output = kept.x.back();
  torch::autograd::set_history(output, node);
  node->save(x, network, kept);
  return output;
}

Tensor mlp(const Tensor& x, const Network& network, bool plain) {
  check(x, network);
  if (reason_for_aten(x, network.chain) || any_tangent(x, network)) return composition::forward(x, network).x.back();
  if (any_requires_grad(x, network)) return with_node(x, network, plain);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return plain ? native::forward(x, network, nullptr) : operators::mlp(x, network);
}

}  // namespace

Tensor mlp(const Tensor& x, const Network& network) {
  if (is_plain(keys_of(x) | keys_of(network.weights) | keys_of(network.biases))) return mlp(x, network, true);
  return operators::mlp(x, network);
}

Tensor mlp_autograd(const Tensor& x, const Network& network) { return mlp(x, network, false); }

}  // namespace pyperc
