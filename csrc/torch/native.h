// The network through the kernels of its device. Arguments have passed `check` and `reason_for_aten`.
#pragma once

#include "composition.h"

namespace pyperc::native {

using composition::Kept;
using composition::Needs;

// The output. With `kept`, also what backward reads.
Tensor forward(const Tensor& x, const Network& network, Kept* kept);

// What becomes of a hidden layer's kept x or s when the pass has read it: it stays, or its memory takes ds and is
// freed, unless somebody else holds it too.
enum class Release { Nothing, Kept };

// [dx, dw(1) ... dw(L), db(1) ... db(L)], undefined where not wanted. `sizes` are the network's; what is not read may
// be undefined: x where dw(1) is not wanted, w(l) where nothing below layer l is.
Tensors backward(const Tensor& dy, const Tensor& x, c10::IntArrayRef sizes, const Tensors& weights, Kept kept,
                 Release release, const Chain& chain, const Needs& needs);

// x = f(s), elementwise.
Tensor activation(const Tensor& s, const LayerActivation& layer);

// Floating-point operations of one product for each layer, the batch given by x's leading dimensions.
double flops(const Tensor& x, const Tensors& weights);

struct LayerPlan {
  int64_t in, out;
  std::string activation;
  Saved saved;
  std::string kernel, tile, blocking, pack;
  int64_t flops;
};
struct BackwardPlan {
  int threads;        // 0 where there is no plan
  std::string split;  // the name of a GradientSplit, in lower case
  int64_t chunk;      // rows; 0 where products go block by block, by what a thread keeps
};
struct NetworkPlan {
  std::string isa;
  int threads;
  std::vector<LayerPlan> layers;
  BackwardPlan backward{};
};
NetworkPlan plan(const Tensor& x, const Network& network);

// Peak of fused multiply-adds in float32 on torch's threads, GF/s.
double probe(double seconds);

}  // namespace pyperc::native
