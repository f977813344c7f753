// The operators of the library pyperc, called through the dispatcher: what a mode, a fake tensor or a tracer sees.
#pragma once

#include "composition.h"

namespace pyperc::operators {

Tensor mlp(const Tensor& x, const Network& network);
composition::Kept mlp_forward(const Tensor& x, const Network& network);
Tensors mlp_backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const composition::Kept& kept,
                     const Chain& chain, const composition::Needs& needs);

// Two of them as compositions of torch's own operations, with the shapes that the kernels give: their decompositions.
// mlp is the output of composed_forward.
Tensors composed_forward(const Tensor& x, const Network& network);
Tensors composed_backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const Tensors& saved,
                          const Chain& chain, const std::vector<bool>& needs);

}  // namespace pyperc::operators
