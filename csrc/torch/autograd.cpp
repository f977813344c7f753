// The autograd node of a network, and the choice between kernels, dispatcher and composition.
#include "autograd.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

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
c10::DispatchKeySet keys_of(const Tensor& x, const Network& network) {
  return keys_of(x) | keys_of(network.weights) | keys_of(network.biases);
}

// A tensor with a __torch_dispatch__ of its own (DTensor, a wrapper) knows torch's operations, not ours. The tensors of
// fake mode and of the tracers, which do know ours, are in use only while their modes are.
bool is_subclass(c10::DispatchKeySet keys) {
  using c10::impl::TorchDispatchModeKey;
  if (!keys.has(c10::DispatchKey::Python)) return false;
  for (const auto mode : {TorchDispatchModeKey::FAKE, TorchDispatchModeKey::PROXY, TorchDispatchModeKey::FUNCTIONAL}) {
    if (c10::impl::TorchDispatchModeTLS::get_mode(mode)) return false;
  }
  return true;
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

// What a network with a node calls: the kernels; the operators, for a mode or a tracer to see; or these also where the
// tensors' class is a subclass, one that has rules for them.
enum class Way { Kernels, Operators, OperatorsOfSubclass };

class MlpBackward : public Node {
 public:
  MlpBackward(const Chain& chain, Way way) : chain_(chain), way_(way) {}

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
      outputs_.emplace_back(keeps(chain_, l) ? kept.x[l] : Tensor(), l + 1 == depth);
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
      const native::Release release = let_go();
      return native::backward(dy, x, sizes, weights, std::move(kept), release, chain_, needs);
    }
    // A tracer is shown the operator; a batch of dy (vmap over the backward pass) needs ATen's own rules.
    const bool batched = keys.has(c10::DispatchKey::FuncTorchBatched) || keys.has(c10::DispatchKey::Batched);
    const bool ruled = way_ == Way::OperatorsOfSubclass;
    if (batched || (is_subclass(keys) && !ruled)) return composition::backward(dy, x, weights, kept, chain_, needs);
    for (size_t l = 0; l < depth; ++l) {
      // The operator takes whole lists; dy stands for the output where that was not kept, as nothing reads it.
      if (!weights[l].defined()) weights[l] = weights_[l].unpack();
      if (!kept.x[l].defined()) kept.x[l] = l + 1 < depth ? outputs_[l].unpack() : outputs_[l].unpack(getptr());
      if (!kept.x[l].defined()) kept.x[l] = dy;
      if (!kept.s[l].defined() && chain_[l].saved() == Saved::Summation) kept.s[l] = summations_[l].unpack();
    }
    return operators::mlp_backward(dy, x_.unpack(), weights, kept, chain_, needs);
  }

  // Compiled autograd records the pass over the whole graph once. It keys the record by what compiled_args collects,
  // then apply_with_saved puts a call into it, with the tracer's stand-ins for what is saved.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const size_t depth = chain_.size();
    for (size_t l = 0; l < depth; ++l) {
      args.collect(chain_[l].info().name);
      args.collect(has_bias_[l]);
    }
    args.collect(chain_.flat_parameters());
    for (size_t i = 0; i < 1 + 2 * depth; ++i) args.collect(task_should_compute_output(i));
    args.collect(x_, false);
    args.collect(weights_, false);
    args.collect(biases_, false);
    for (size_t l = 0; l < depth; ++l) args.collect(outputs_[l], l + 1 == depth);
    args.collect(summations_, false);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    using namespace torch::dynamo::autograd;
    const size_t depth = chain_.size();
    saved.before(x_);
    for (auto* list : {&weights_, &biases_, &outputs_, &summations_}) saved.before(*list);
    // Lists of what is defined; the record tells from the flags and the chain where each belongs.
    Tensors weights, biases, outputs, summations;
    std::vector<bool> needs;
    for (size_t l = 0; l < depth; ++l) {
      weights.push_back(weights_[l].unpack());
      if (has_bias_[l]) biases.push_back(biases_[l].unpack());
      if (keeps(chain_, l)) outputs.push_back(l + 1 < depth ? outputs_[l].unpack() : outputs_[l].unpack(getptr()));
      if (chain_[l].saved() == Saved::Summation) summations.push_back(summations_[l].unpack());
    }
    for (size_t i = 0; i < 1 + 2 * depth; ++i) needs.push_back(task_should_compute_output(i));
    PackedArgs packed;
    packed.pack(chain_.names());
    packed.pack(chain_.flat_parameters());
    packed.pack(has_bias_);
    packed.pack(needs);
    packed.pack(x_.unpack());
    for (const Tensors* list : {&weights, &biases, &outputs, &summations}) packed.pack(*list);
    const std::vector<c10::IValue> arguments = packed.vec();
    std::vector<at::TypePtr> schema;
    for (const c10::IValue& argument : arguments) {
      schema.push_back(argument.isTensor() ? at::TypePtr(at::TensorType::get()) : argument.type());
    }
    const auto& compiler = getPyCompilerInterface();
    const std::string function = compiler->bind_function(saved.get_py_compiler(), name(), recorded, schema,
                                                         /*is_custom_function=*/true, /*is_traceable=*/true);
    const variable_list gradients =
        compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads, arguments,
                                IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
                                    get_input_metadata(next_edges())));
    saved.after(x_);
    for (auto* list : {&weights_, &biases_, &outputs_, &summations_}) saved.after(*list);
    return gradients;
  }

 private:
  // The network's output is kept only where f' reads it: where not, changing it in place does no harm.
  static bool keeps(const Chain& chain, size_t l) {
    return l + 1 < chain.size() ? composition::keeps_output(chain, l) : chain[l].saved() == Saved::Output;
  }

  // Where autograd frees the graph behind this pass, what is kept of the hidden layers is the pass's from here on. What
  // hooks have brought back may be somebody's.
  native::Release let_go() {
    if (torch::autograd::get_current_graph_task_keep_graph()) return native::Release::Nothing;
    native::Release release = native::Release::Kept;
    const auto let_go_of = [&](SavedVariable& saved) {
      if (saved.has_hooks()) release = native::Release::Nothing;
      saved.reset_data();
    };
    for (size_t l = 0; l < chain_.size(); ++l) {
      if (l + 1 < chain_.size()) let_go_of(outputs_[l]);
      let_go_of(summations_[l]);
    }
    return release;
  }

  // What the record of compiled autograd calls: apply, with everything as arguments.
  static variable_list recorded(const variable_list& grads, const std::vector<c10::IValue>& arguments) {
    torch::dynamo::autograd::PackedArgs packed(arguments);
    const auto names = packed.unpack<std::vector<std::string>>();
    const auto parameters = packed.unpack<std::vector<double>>();
    const Chain chain = Chain::flat(names, parameters);
    const auto has_bias = packed.unpack<std::vector<bool>>(), flags = packed.unpack<std::vector<bool>>();
    const auto x = packed.unpack<Tensor>();
    const auto weights = packed.unpack<Tensors>(), some_biases = packed.unpack<Tensors>();
    const auto outputs = packed.unpack<Tensors>(), summations = packed.unpack<Tensors>();
    const size_t depth = chain.size();
    const Tensor& dy = grads[0];
    if (!dy.defined()) return variable_list(1 + 2 * depth);
    Needs needs(depth);
    needs.x = flags[0];
    Tensors biases(depth);
    Kept kept{Tensors(depth), Tensors(depth)};
    kept.x.back() = dy;  // in the place of an output that nothing reads
    for (size_t l = 0, b = 0, o = 0, s = 0; l < depth; ++l) {
      needs.weights[l] = flags[1 + l];
      needs.biases[l] = has_bias[l] && flags[1 + depth + l];
      if (has_bias[l]) biases[l] = some_biases[b++];
      if (keeps(chain, l)) kept.x[l] = outputs[o++];
      if (chain[l].saved() == Saved::Summation) kept.s[l] = summations[s++];
    }
    if (c10::GradMode::is_enabled()) return differentiable(dy, x, weights, biases, chain, needs);
    return operators::mlp_backward(dy, x, weights, kept, chain, needs);
  }

  // Under create_graph: the gradients as functions of dy, x, w and b, so that they have derivatives of any order.
  static variable_list differentiable(const Tensor& dy, const Tensor& x, const Tensors& weights, const Tensors& biases,
                                      const Chain& chain, const Needs& needs) {
    const Kept kept = composition::forward(x, {weights, biases, chain});
    return composition::backward(dy, x, weights, kept, chain, needs);
  }
  variable_list differentiable(const Tensor& dy, Tensors weights, const Needs& needs) const {
    Tensors biases;
    for (size_t l = 0; l < weights.size(); ++l) {
      if (!weights[l].defined()) weights[l] = weights_[l].unpack();
      biases.push_back(has_bias_[l] ? biases_[l].unpack() : Tensor());
    }
    return differentiable(dy, x_.unpack(), weights, biases, chain_, needs);
  }

  const Chain chain_;
  const Way way_;
  std::vector<c10::SymInt> sizes_;
  SavedVariable x_;
  std::vector<SavedVariable> weights_, biases_, outputs_, summations_;
  std::vector<bool> has_bias_;
};

Tensor with_node(const Tensor& x, const Network& network, Way way) {
  const auto node = MakeNode<MlpBackward, NodePointer>::make(network.chain, way);
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
    if (way == Way::Kernels) {
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

Tensor mlp(const Tensor& x, const Network& network, Way way) {
  check(x, network);
  const bool unknown = way == Way::Operators && is_subclass(keys_of(x, network));
  if (unknown || reason_for_aten(x, network.chain) || any_tangent(x, network)) {
    return composition::forward(x, network).x.back();
  }
  if (any_requires_grad(x, network)) return with_node(x, network, way);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return way == Way::Kernels ? native::forward(x, network, nullptr) : operators::mlp(x, network);
}

}  // namespace

Tensor mlp(const Tensor& x, const Network& network) {
  const c10::DispatchKeySet keys = keys_of(x, network);
  if (is_plain(keys)) {
    // What the dispatcher would tell the profiler.
    RECORD_FUNCTION("pyperc::mlp", (std::vector<c10::IValue>{x, network.weights}), at::sequence_number::peek());
    return mlp(x, network, Way::Kernels);
  }
  if (is_subclass(keys)) {
    check(x, network);
    return composition::forward(x, network).x.back();
  }
  return operators::mlp(x, network);
}

Tensor mlp_of_subclass(const Tensor& x, const Network& network) {
  const c10::DispatchKeySet own({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot});
  if (is_plain(keys_of(x, network) - own)) return mlp(x, network, Way::OperatorsOfSubclass);
  check(x, network);
  return composition::forward(x, network).x.back();
}

bool is_native(const Tensor& x, const Network& network) {
  return is_plain(keys_of(x, network)) && !reason_for_aten(x, network.chain) && !any_tangent(x, network) &&
         !any_requires_grad(x, network);
}

Tensor mlp_autograd(const Tensor& x, const Network& network) { return mlp(x, network, Way::Operators); }

}  // namespace pyperc
