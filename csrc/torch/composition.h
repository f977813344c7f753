// The network as a composition of ATen operations: for what has no kernel, and wherever derivatives of the derivative,
// forward-mode tangents, batching (torch.func) or autocast must see through it.
#pragma once

#include "network.h"

namespace pyperc::composition {

Tensor activation(const Tensor& s, const LayerActivation& layer);

// What backward reads: x(1) ... x(L), the last being the network's output, and s(l), undefined unless Saved::Summation.
struct Kept {
  Tensors x, s;
};

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

}  // namespace pyperc::composition
