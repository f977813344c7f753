// The whole network on the CPU: forward and backward, each one call.
#pragma once

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
  return b.cs == 1 && reads_in_place(m, k, b.rs * static_cast<int64_t>(sizeof(T)));
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
