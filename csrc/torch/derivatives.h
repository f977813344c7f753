// The derivatives of a network with respect to its input: the Jacobian, and its products with a vector on either side.
#pragma once

#include <tuple>

#include "network.h"

namespace pyperc::derivatives {

// J = diag(f'(s(L))) w(L) ... diag(f'(s(1))) w(1) for each x: [..., sizes[0]] -> [..., sizes[L], sizes[0]].
Tensor jacobian(const Tensor& x, const Network& network);

// (y, J^T dy) and (y, J dx), dy shaped like y and dx like x.
std::tuple<Tensor, Tensor> vjp(const Tensor& x, const Tensor& dy, const Network& network);
std::tuple<Tensor, Tensor> jvp(const Tensor& x, const Tensor& dx, const Network& network);

}  // namespace pyperc::derivatives
