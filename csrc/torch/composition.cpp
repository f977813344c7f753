// The network as a composition of ATen operations.
#include "composition.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/hardtanh_backward.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log1p.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace pyperc::composition {

namespace {

// The activation's own text over tensors, or ATen's operator where there is one: a single rounding in 16 bits, and
// derivatives of its own.
template <class A>
Tensor f(const Tensor& s, const Parameters& p) {
  return A::f(s, p);
}
template <>
Tensor f<Relu>(const Tensor& s, const Parameters&) {
  return at::relu(s);
}
template <>
Tensor f<LeakyRelu>(const Tensor& s, const Parameters& p) {
  return at::leaky_relu(s, p.value[0]);
}
template <>
Tensor f<Elu>(const Tensor& s, const Parameters& p) {
  return at::elu(s, p.value[0]);
}
template <>
Tensor f<Softplus>(const Tensor& s, const Parameters& p) {
  return at::softplus(s, p.value[0], p.value[1]);
}
template <>
Tensor f<Gelu>(const Tensor& s, const Parameters&) {
  return at::gelu(s);
}
template <>
Tensor f<GeluTanh>(const Tensor& s, const Parameters&) {
  return at::gelu(s, "tanh");
}
template <>
Tensor f<Silu>(const Tensor& s, const Parameters&) {
  return at::silu(s);
}
template <>
Tensor f<Hardtanh>(const Tensor& s, const Parameters& p) {
  return at::hardtanh(s, p.value[0], p.value[1]);
}

// Its derivative likewise; of a piecewise linear one, what torch has there depends on s, if only by a zero, as code
// that takes second derivatives of any network expects.
template <class A>
Tensor backward(const Tensor& dx, const Tensor& saved, const Parameters& p) {
  return A::backward(dx, saved, p);
}
template <>
Tensor backward<Relu>(const Tensor& dx, const Tensor& x, const Parameters&) {
  return at::threshold_backward(dx, x, 0);
}
template <>
Tensor backward<LeakyRelu>(const Tensor& dx, const Tensor& x, const Parameters& p) {
  return at::leaky_relu_backward(dx, x, p.value[0], /*self_is_result=*/false);
}
template <>
Tensor backward<Hardtanh>(const Tensor& dx, const Tensor& x, const Parameters& p) {
  return at::hardtanh_backward(dx, x, p.value[0], p.value[1]);
}
template <>
Tensor backward<Gelu>(const Tensor& dx, const Tensor& s, const Parameters&) {
  return at::gelu_backward(dx, s);
}

Tensor differentiate(const Tensor& dx, const Tensor& saved, const LayerActivation& layer) {
  switch (layer.activation) {
#define X(A) \
  case Activation::A: return backward<A>(dx, saved, layer.parameters);
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor rows_of(const Tensor& t) { return t.dim() == 2 ? t : t.dim() == 1 ? t.unsqueeze(0) : t.flatten(0, -2); }

}  // namespace

Tensor activation(const Tensor& s, const LayerActivation& layer) {
  switch (layer.activation) {
#define X(A) \
  case Activation::A: return f<A>(s, layer.parameters);
    PYPERC_ACTIVATIONS(X)
#undef X
  }
  TORCH_INTERNAL_ASSERT(false);
}

Tensor slope(const Tensor& saved, const LayerActivation& layer) {
  if (layer.activation == Activation::Identity) return {};
  return differentiate(at::ones_like(saved), saved, layer);
}

Kept forward(const Tensor& x, const Network& network) {
  Kept kept;
  const Tensor* in = &x;
  for (size_t l = 0; l < network.depth(); ++l) {
    const Tensor& b = network.biases[l];
    const Tensor s = at::linear(*in, network.weights[l], b.defined() ? std::optional<Tensor>(b) : std::nullopt);
    kept.s.push_back(network.chain[l].saved() == Saved::Summation ? s : Tensor());
    kept.x.push_back(activation(s, network.chain[l]));
    in = &kept.x.back();
  }
  return kept;
}

Tensors backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const Kept& kept, const Chain& chain,
                 const Needs& needs) {
  const size_t depth = weights.size();
  Tensors gradients(1 + 2 * depth);
  // Below the lowest layer that wants a gradient nothing is computed.
  size_t lowest = needs.x ? 0 : depth;
  for (size_t l = depth; l-- > 0;) {
    if (needs.weights[l] || needs.biases[l]) lowest = l;
  }
  if (needs.x) lowest = 0;
  // As rows throughout: what the kernels kept has no leading dimensions, what was composed has.
  Tensor dx = rows_of(dy);
  for (size_t l = depth; l-- > lowest;) {
    // Where f' reads neither, dx stands in its place.
    const Tensor& saved = chain[l].saved() == Saved::Summation ? kept.s[l]
                          : chain[l].saved() == Saved::Output  ? kept.x[l]
                                                               : dx;
    const Tensor ds = differentiate(dx, rows_of(saved), chain[l]);
    if (needs.weights[l]) {
      const Tensor in = l == 0 ? x : kept.x[l - 1].defined() ? kept.x[l - 1] : activation(kept.s[l - 1], chain[l - 1]);
      gradients[1 + l] = ds.t().matmul(rows_of(in));
    }
    if (needs.biases[l]) gradients[1 + depth + l] = ds.sum(0);
    if (l > lowest || (l == 0 && needs.x)) dx = ds.matmul(weights[l]);
  }
  if (needs.x) {
    std::vector<c10::SymInt> sizes = dy.sym_sizes().vec();
    sizes.back() = weights[0].sym_size(1);
    gradients[0] = dx.reshape_symint(sizes);
  }
  return gradients;
}

Tensor loss(const Tensor& input, const Tensor& target, const LossChoice& choice) {
  const auto composed = [&](auto one) -> Tensor {
    using L = decltype(one);
    if constexpr (L::over == LossOver::Element) {
      return L::value(input, target, choice.parameters);
    } else {
      TORCH_CHECK_VALUE(false, "loss: ", L::name, " is no loss of single elements");
    }
  };
  switch (choice.loss) {
#define X(L) \
  case Loss::L: return composed(L{});
    PYPERC_LOSSES(X)
#undef X
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace pyperc::composition
