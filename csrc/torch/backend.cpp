// The backends by device, and the calls that go to them.
#include "backend.h"

#include <algorithm>
#include <array>
#include <utility>

namespace pyperc {

namespace {

std::array<Backend, static_cast<size_t>(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)>& backends() {
  static std::array<Backend, static_cast<size_t>(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)> list{};
  return list;
}

const Backend& backend_of(const Tensor& t) { return *find_backend(t.device().type()); }

// Beside a layer of width 0 gradients are sums of nothing, which no kernel comes by to write.
bool has_kernels_backward(c10::IntArrayRef sizes) { return std::find(sizes.begin(), sizes.end(), 0) == sizes.end(); }

}  // namespace

const Backend* find_backend(c10::DeviceType type) {
  const Backend& backend = backends()[static_cast<size_t>(type)];
  return backend.forward ? &backend : nullptr;
}

bool add_backend(c10::DeviceType type, const Backend& backend) {
  backends()[static_cast<size_t>(type)] = backend;
  return true;
}

namespace native {

Tensor forward(const Tensor& x, const Network& network, Kept* kept) { return backend_of(x).forward(x, network, kept); }

Tensors backward(const Tensor& dy, const Tensor& x, c10::IntArrayRef sizes, const Tensors& weights, Kept kept,
                 Release release, const Chain& chain, const Needs& needs) {
  if (!has_kernels_backward(sizes)) return composition::backward(dy, x, weights, kept, chain, needs);
  return backend_of(dy).backward(dy, x, sizes, weights, std::move(kept), release, chain, needs);
}

Tensor activation(const Tensor& s, const LayerActivation& layer) {
  TORCH_CHECK_TYPE(
      find_backend(s.device().type()) && visit(s.scalar_type(), [](auto) {}),
      "activation: x must be a float32, float64, bfloat16 or float16 tensor on a device with kernels, got ",
      s.scalar_type(), " on ", s.device());
  return backend_of(s).activation(s, layer);
}

NetworkPlan plan(const Tensor& x, const Network& network) {
  NetworkPlan report = backend_of(x).plan(x, network);
  for (const LayerPlan& layer : report.layers) {
    if (!has_kernels_backward({layer.in, layer.out})) report.backward = {};
  }
  return report;
}

}  // namespace native

}  // namespace pyperc

// The tests put the CUDA backend, over emulated kernels, in the place of the CPU's.
extern "C" __attribute__((visibility("default"))) void pyperc_exchange_backend(int type, pyperc::Backend* backend) {
  std::swap(pyperc::backends()[static_cast<size_t>(type)], *backend);
}
