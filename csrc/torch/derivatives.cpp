// The derivatives of a network with respect to its input, as products of the layers' Jacobians.
#include "derivatives.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "autograd.h"
#include "native.h"

namespace pyperc::derivatives {

namespace {

using composition::Kept;
using composition::Needs;

// Rows that go through all layers together hold about this much in each layer, so that they stay in the cache.
constexpr int64_t CHUNK_BYTES = 1 << 20;

// rows w, or rows w^T: the kernels' forward pass of one layer without bias, or torch's own product.
enum class Run { Native, Composed };
Tensor product(const Tensor& rows, const Tensor& w, Run run) {
  if (run == Run::Composed) return at::matmul(rows, w);
  static const Chain identity({"identity"}, {{}});
  const Tensors weights{w.t()}, biases{Tensor()};
  return native::forward(rows, {weights, biases, identity}, nullptr);
}

// diag(slope), laid over the rows; an undefined slope is one.
Tensor scaled(const Tensor& rows, const Tensor& slope, Run run) {
  if (!slope.defined()) return rows;
  return run == Run::Native ? rows.mul_(slope) : rows * slope;
}

// f'(s) by the kernel that multiplies with it, applied to ones: rows of `saved` may lie apart.
template <class T>
Tensor slope_by_kernel(const Tensor& saved, const LayerActivation& layer) {
  const int64_t columns = saved.size(-1), rows = columns ? saved.numel() / columns : 0;
  const Tensor ones = at::ones({columns}, saved.options());
  const Tensor slope = at::empty(saved.sizes(), saved.options());
  const Map<T> map{rows,
                   columns,
                   ones.const_data_ptr<T>(),
                   0,
                   slope.data_ptr<T>(),
                   columns,
                   saved.const_data_ptr<T>(),
                   saved.dim() > 1 ? saved.stride(-2) : columns,
                   nullptr,
                   layer.parameters};
  isa().kernels(T{}).differentiate[static_cast<int>(layer.activation)](map);
  return slope;
}

Tensor slope(const Kept& kept, const Chain& chain, size_t l, Run run) {
  const Tensor& saved = kept.s[l].defined() ? kept.s[l] : kept.x[l];
  if (run == Run::Composed || !saved.is_cpu() || saved.dim() != 2 || chain[l].activation == Activation::Identity) {
    return composition::slope(saved, chain[l]);
  }
  if (saved.scalar_type() == at::kFloat) return slope_by_kernel<float>(saved, chain[l]);
  if (saved.scalar_type() == at::kDouble) return slope_by_kernel<double>(saved, chain[l]);
  return composition::slope(saved, chain[l]);
}

// f'(s(l)) of every layer.
Tensors slopes(const Kept& kept, const Chain& chain, Run run) {
  Tensors list;
  for (size_t l = 0; l < chain.size(); ++l) list.push_back(slope(kept, chain, l, run));
  return list;
}

// The layer where the rows begin, without a product: the unit vectors' would be the weight itself.
Tensor first_rows(const Tensor& slope, const Tensor& w, const c10::SymInt& batch) {
  return slope.defined() ? slope * w : w.expand_symint({batch, w.sym_size(0), w.sym_size(1)});
}

// From the output down, a row for each output: [batch, out, in].
Tensor from_output(const Tensors& slopes, const Tensors& weights, const c10::SymInt& batch, Run run) {
  const size_t depth = weights.size();
  Tensor rows =
      first_rows(slopes[depth - 1].defined() ? slopes[depth - 1].unsqueeze(-1) : Tensor(), weights[depth - 1], batch);
  for (size_t l = depth - 1; l-- > 0;) {
    if (slopes[l].defined()) rows = rows * slopes[l].unsqueeze(-2);
    rows = product(rows, weights[l], run);
  }
  return rows;
}

// From the input up, a row for each input: [batch, in, out].
Tensor from_input(const Tensors& slopes, const Tensors& weights, const c10::SymInt& batch, Run run) {
  Tensor rows = first_rows(slopes[0].defined() ? slopes[0].unsqueeze(-2) : Tensor(), weights[0].t(), batch);
  for (size_t l = 1; l < weights.size(); ++l) {
    rows = product(rows, weights[l].t(), run);
    if (slopes[l].defined()) rows = scaled(rows, slopes[l].unsqueeze(-2), run);
  }
  return rows;
}

// [batch, in] -> [batch, out, in].
Tensor jacobian_of_rows(const Tensor& x, const Network& network, Run run) {
  Kept kept;
  if (run == Run::Native) {
    native::forward(x, network, &kept);
  } else {
    kept = composition::forward(x, network);
  }
  const Tensors f = slopes(kept, network.chain, run);
  // Products of rows with all weights but the one at the end where the rows begin.
  const int64_t in = network.weights.front().size(1), out = network.weights.back().size(0);
  int64_t total = 0;
  for (const Tensor& w : network.weights) total += w.size(0) * w.size(1);
  const int64_t down = out * (total - network.weights.back().size(0) * network.weights.back().size(1));
  const int64_t up = in * (total - network.weights.front().size(0) * network.weights.front().size(1));
  if (down <= up) return from_output(f, network.weights, x.sym_size(0), run);
  return from_input(f, network.weights, x.sym_size(0), run).transpose(-1, -2);
}

void check_like(const Tensor& t, const Tensor& x, c10::SymIntArrayRef sizes, const char* name) {
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type() && t.device() == x.device(), name, " must have x's dtype ",
                   x.scalar_type(), " and device ", x.device(), ", got ", t.scalar_type(), " on ", t.device());
  TORCH_CHECK_VALUE(t.sym_sizes() == sizes, name, " must be ", sizes, ", got ", t.sym_sizes());
}

}  // namespace

Tensor jacobian(const Tensor& x, const Network& network) {
  check(x, network);
  const Run run = is_native(x, network) ? Run::Native : Run::Composed;
  const int64_t in = network.weights.front().size(1), out = network.weights.back().size(0);
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = out;
  sizes.emplace_back(in);
  const Tensor rows = x.dim() == 2 ? x : x.dim() == 1 ? x.unsqueeze(0) : x.flatten(0, -2);
  // A single layer without a slope is its weight, which the result must not share.
  if (run == Run::Composed) return jacobian_of_rows(rows, network, run).clone().reshape_symint(sizes);

  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  int64_t widest = 1;
  for (const Tensor& w : network.weights) widest = std::max({widest, w.size(0), w.size(1)});
  const int64_t batch = rows.size(0);
  const int64_t row_bytes = std::max<int64_t>(1, std::min(in, out)) * widest * static_cast<int64_t>(x.element_size());
  const int64_t chunk = std::max<int64_t>(1, CHUNK_BYTES / row_bytes);
  if (batch <= chunk && network.depth() > 1) {
    return jacobian_of_rows(rows, network, run).contiguous().reshape_symint(sizes);
  }
  const Tensor result = at::empty({batch, out, in}, x.options());
  for (int64_t i = 0; i < batch; i += chunk) {
    const int64_t n = std::min(chunk, batch - i);
    result.narrow(0, i, n).copy_(jacobian_of_rows(rows.narrow(0, i, n), network, run));
  }
  return result.reshape_symint(sizes);
}

std::tuple<Tensor, Tensor> vjp(const Tensor& x, const Tensor& dy, const Network& network) {
  check(x, network);
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = network.weights.back().sym_size(0);
  check_like(dy, x, sizes, "vjp: dy");
  Needs needs(network.depth());
  needs.x = true;
  Kept kept;
  if (is_native(x, network) && is_native(dy, network)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::vector<int64_t> widths{network.weights[0].size(1)};
    for (const Tensor& w : network.weights) widths.push_back(w.size(0));
    const Tensor y = native::forward(x, network, &kept);
    return {y, native::backward(dy, x, widths, network.weights, std::move(kept), native::Release::Kept, network.chain,
                                needs)[0]};
  }
  kept = composition::forward(x, network);
  return {kept.x.back(), composition::backward(dy, x, network.weights, kept, network.chain, needs)[0]};
}

std::tuple<Tensor, Tensor> jvp(const Tensor& x, const Tensor& dx, const Network& network) {
  check(x, network);
  check_like(dx, x, x.sym_sizes(), "jvp: dx");
  const bool native = is_native(x, network) && is_native(dx, network);
  const Run run = native ? Run::Native : Run::Composed;
  const auto tangent = [&](const Kept& kept) {
    Tensor rows = dx;
    for (size_t l = 0; l < network.depth(); ++l) {
      rows = product(rows, network.weights[l].t(), run);
      const Tensor f = slope(kept, network.chain, l, run);
      if (f.defined()) rows = scaled(rows, f.reshape_symint(rows.sym_sizes()), run);
    }
    return rows;
  };
  if (!native) {
    const Kept kept = composition::forward(x, network);
    return {kept.x.back(), tangent(kept)};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Kept kept;
  const Tensor y = native::forward(x, network, &kept);
  return {y, tangent(kept)};
}

}  // namespace pyperc::derivatives
