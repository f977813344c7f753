// The kernels of one kind of device. Each registers itself when the module is loaded; a device without is run by ATen.
#pragma once

#include "native.h"

namespace pyperc {

// A number that the plan of a backend reads, which benchmarks and tests may set.
struct Threshold {
  const char* name;
  int64_t* value;
};

struct Backend {
  Tensor (*forward)(const Tensor& x, const Network& network, native::Kept* kept);
  Tensors (*backward)(const Tensor& dy, const Tensor& x, c10::IntArrayRef sizes, const Tensors& weights,
                      native::Kept kept, native::Release release, const Chain& chain, const native::Needs& needs);
  Tensor (*activation)(const Tensor& s, const LayerActivation& layer);
  native::NetworkPlan (*plan)(const Tensor& x, const Network& network);
  // Why the kernels cannot run on that device; null where they can.
  const char* (*reason)(c10::Device device);
  std::vector<Threshold> (*thresholds)();
};

const Backend* find_backend(c10::DeviceType type);
bool add_backend(c10::DeviceType type, const Backend& backend);

}  // namespace pyperc
