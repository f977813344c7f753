// The whole network on the CPU: forward and backward, each one call.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "plan.h"

namespace pyperc {

// Whether a layer's forward product reads w along its rows, one sum for each lane, rather than a packed transpose: for
// few rows, or columns, of sums long enough to pay for adding up the lanes.
template <class S>
bool reads_rows(const Plan& plan, const LayerSpec& spec, Matrix<const S> w) {
  const Thresholds& limits = thresholds();
  const int64_t few = std::min(plan.chunk, spec.out);
  return w.cs == 1 && (plan.chunk <= limits.dot_rows || (few <= limits.dot_most && few * limits.dot_terms <= spec.in));
}

// Whether b [k, n], the right-hand side of a product with m rows, is read in place rather than packed. In 16 bits none
// is.
template <class T>
bool reads_in_place(int64_t m, int64_t k, Matrix<const T> b) {
  return b.cs == 1 && (std::min(m, k) <= thresholds().few_rows || in_place(b.rs * static_cast<int64_t>(sizeof(T))));
}

// How a backward pass over S goes by its plan; activation(l) is that of layer l. In 16 bits, by layers: dw of a
// thread's own rows would take float32. Without activations between layers threads sum no dw of their own: plain torch,
// which has no ds then, holds less.
template <class S, class F>
GradientSplit gradient_split(const Plan& plan, int depth, F activation) {
  if (!std::is_floating_point_v<S>) return GradientSplit::Layers;
  bool sums_by_rows = depth == 1;
  for (int l = 0; l + 1 < depth; ++l) sums_by_rows = sums_by_rows || activation(l) != Activation::Identity;
  return sums_by_rows || plan.gradient != GradientSplit::Rows ? plan.gradient : GradientSplit::Layers;
}

// x(l) = f(x(l-1) w(l)^T + b(l)) for all layers. The strides of pass.x are arbitrary; x(l) and s(l) have unit column
// stride.
template <class T>
void forward(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass, const Parallel& parallel,
             Memory& memory);
template <class S>
void forward(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass, const Parallel& parallel,
             Memory& memory);

// dw, db and dx as far as they are wanted. The strides of dy, x and w are arbitrary.
template <class T>
void backward(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass, const Parallel& parallel,
              Memory& memory);
template <class S>
void backward(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass, const Parallel& parallel,
              Memory& memory);

}  // namespace pyperc
