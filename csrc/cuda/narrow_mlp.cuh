// The launchers of narrow networks, for the one dtype that each narrow_mlp_*.cu names.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "narrow_backward.cuh"
#include "narrow_forward.cuh"

namespace pyperc::cuda {

// f(the shape that holds layers so wide)
template <template <class, int> class SHAPE, class T, class F>
auto with_narrow_shape(int widest, F f) {
  if (widest <= 32) return f(SHAPE<T, 32>{});
  return widest <= 64 ? f(SHAPE<T, 64>{}) : f(SHAPE<T, NARROW_WIDTH>{});
}
template <class PASS>
int widest_of(const PASS& pass) {
  int widest = 0;
  for (int l = 0; l < pass.depth; ++l) widest = std::max({widest, pass.layers[l].in, pass.layers[l].out});
  return widest;
}
// As many blocks as fit at once.
template <class S>
Grid narrow_grid(int64_t batch, size_t shared, const Device& device) {
  constexpr size_t RESERVED = 1 << 10;  // of each block, by the system
  const auto fit = std::max<int64_t>(1, (device.shared + RESERVED) / (shared + RESERVED));
  const int64_t most = device.multiprocessors * std::min<int64_t>(S::BLOCKS, fit);
  return {std::min(divide_up(batch, S::BM), most), S::THREADS, shared};
}

template <class T>
bool is_narrow(int depth, int widest, const Device& device) {
  if (depth > NARROW_DEPTH || widest > NARROW_WIDTH) return false;
  const auto forward = [&](auto shape) { return shape.shared(std::min(depth, 2)) <= device.shared; };
  const auto backward = [&](auto shape) { return shape.SHARED <= device.shared; };
  return with_narrow_shape<ForwardShape, T>(widest, forward) && with_narrow_shape<BackwardShape, T>(widest, backward);
}

template <class T>
Status narrow_forward(const NarrowForward<T>& g, const Device& device, Stream stream) {
  if (g.batch == 0) return SUCCESS;
  return with_narrow_shape<ForwardShape, T>(widest_of(g), [&](auto shape) {
    using S = decltype(shape);
    const bool all = S::shared(g.depth) <= device.shared;
    const int places = all ? g.depth : std::min(g.depth, 2);
    return launch(narrow_forward_kernel<T, S>, narrow_grid<S>(g.batch, S::shared(places), device), stream, g, places);
  });
}

// The workspace: the sums of all blocks, then the rows of ds, in whole pieces of 16 bytes, which one layer writes over
// what it has read; of the last layer only where ds is not dy.
template <class T, class S>
struct BackwardSpace {
  Grid grid;
  int64_t sums, pitch = 0;  // floats; elements of T

  BackwardSpace(const NarrowBackward<T>& g, const Device& device)
      : grid(narrow_grid<S>(g.batch, S::SHARED, device)), sums(grid.blocks * g.depth * S::LAYER_SUMS) {
    const int written = g.depth - (g.layers[g.depth - 1].activation == Activation::Identity ? 1 : 0);
    for (int l = 0; l < written; ++l) {
      pitch = std::max(pitch, divide_up(g.layers[l].out, Vector<T>::SIZE) * Vector<T>::SIZE);
    }
  }
  size_t bytes(int64_t batch) const { return sums * sizeof(float) + batch * pitch * sizeof(T); }
};

template <class T>
size_t narrow_workspace(const NarrowBackward<T>& g, const Device& device) {
  return with_narrow_shape<BackwardShape, T>(
      widest_of(g), [&](auto shape) { return BackwardSpace<T, decltype(shape)>(g, device).bytes(g.batch); });
}

template <class T>
Status narrow_backward(const NarrowBackward<T>& g, const Device& device, Stream stream) {
  return with_narrow_shape<BackwardShape, T>(widest_of(g), [&](auto shape) {
    using S = decltype(shape);
    const BackwardSpace<T, S> space(g, device);
    auto* sums = static_cast<float*>(g.workspace);
    T* buffer = reinterpret_cast<T*>(sums + space.sums);
    const NarrowLayer<T>& top = g.layers[g.depth - 1];
    const T* ds = g.dy;
    int64_t ld_ds = g.ld_dy;
    Status status = SUCCESS;
    if (top.activation != Activation::Identity) {
      Differentiate<T> pass{g.batch, top.out, ds, ld_ds, top.kept, top.ld_kept, buffer, space.pitch};
      pass.activation = top.activation;
      pass.parameters = top.parameters;
      status = differentiate(pass, stream);
      ds = buffer;
      ld_ds = space.pitch;
    }
    for (int l = g.depth - 1; l >= 0 && status == SUCCESS; --l) {
      const NarrowLayer<T>& layer = g.layers[l];
      NarrowStep<T> step{g.batch, layer.in, layer.out, layer.w, layer.ld_w, ds, ld_ds};
      if (l) {
        const NarrowLayer<T>& under = g.layers[l - 1];
        step.x = under.kept;
        step.ld_x = under.ld_kept;
        step.below = buffer;
        step.ld_below = space.pitch;
        step.activation = under.activation;
        step.parameters = under.parameters;
      } else {
        step.x = g.x;
        step.ld_x = g.ld_x;
        step.below = g.dx;
        step.ld_below = g.ld_dx;
        step.activation = Activation::Identity;
      }
      step.sums = sums + l * S::LAYER_SUMS;
      step.sums_apart = g.depth * S::LAYER_SUMS;
      status = launch(narrow_backward_kernel<T, S>, space.grid, stream, step);
      ds = buffer;
      ld_ds = space.pitch;
    }
    if (status != SUCCESS) return status;
    return launch(narrow_sum_kernel<T, S>,
                  {g.depth * NARROW_SUM_BLOCKS<S>, NARROW_SUM_THREADS, NARROW_SUM_THREADS * sizeof(float)}, stream, g,
                  space.grid.blocks);
  });
}

#define PYPERC_NARROW(T)                                                             \
  template bool is_narrow<T>(int, int, const Device&);                               \
  template Status narrow_forward<T>(const NarrowForward<T>&, const Device&, Stream); \
  template size_t narrow_workspace<T>(const NarrowBackward<T>&, const Device&);      \
  template Status narrow_backward<T>(const NarrowBackward<T>&, const Device&, Stream);

}  // namespace pyperc::cuda
