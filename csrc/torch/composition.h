// The network as a composition of ATen operations: for what has no kernel, and wherever derivatives of the derivative,
// forward-mode tangents, batching (torch.func) or autocast must see through it.
#pragma once

#include "losses.h"
#include "network.h"

namespace pyperc::composition {

Tensor activation(const Tensor& s, const LayerActivation& layer);

// f'(s), read from s or from x = f(s) as Saved says. Undefined for the identity, whose slope is one.
Tensor slope(const Tensor& saved, const LayerActivation& layer);

// What backward reads: x(1) ... x(L), the last being the network's output, and s(l), undefined unless Saved::Summation.
// Of a hidden layer with s(l), x(l) need not be kept: it is made again from s(l), so that such a layer, like any other,
// costs one buffer.
struct Kept {
  Tensors x, s;
};
inline bool keeps_output(const Chain& chain, size_t l) {
  return l + 1 == chain.size() || chain[l].saved() != Saved::Summation;
}

Kept forward(const Tensor& x, const Network& network);

// Which gradients are wanted.
struct Needs {
  bool x = false;
  std::vector<bool> weights, biases;

  Needs() = default;
  explicit Needs(size_t depth) : weights(depth), biases(depth) {}
};

// [dx, dw(1) ... dw(L), db(1) ... db(L)], undefined where not wanted.
Tensors backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const Kept& kept, const Chain& chain,
                 const Needs& needs);

// Each element's loss; throws for those of whole rows.
Tensor loss(const Tensor& input, const Tensor& target, const LossChoice& choice);

}  // namespace pyperc::composition
