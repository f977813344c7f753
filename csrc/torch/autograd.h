// The differentiable network: one autograd node for all of its layers.
#pragma once

#include "network.h"

namespace pyperc {

// The way in from eager mode: checks, then kernels with a node of our own where nothing but autograd stands between
// these tensors and the CPU; else the dispatcher.
Tensor mlp(const Tensor& x, const Network& network);

// The same for tensors of a subclass that has rules for our operators: its __torch_dispatch__ is shown these, where
// that of another subclass is shown torch's own operations.
Tensor mlp_of_subclass(const Tensor& x, const Network& network);

// What the autograd key of pyperc::mlp runs.
Tensor mlp_autograd(const Tensor& x, const Network& network);

// Whether the kernels may be called on these tensors as they are, with nothing to record: no derivatives, no calls.
bool is_native(const Tensor& x, const Network& network);

}  // namespace pyperc
