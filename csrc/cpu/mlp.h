// The whole network on the CPU: forward and backward, each one call.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace pyperc {

// Whether a layer's forward product reads w along its rows, one sum for each lane, rather than a packed transpose.
template <class T>
bool reads_rows(const Kernels<T>& kernels, const Plan& plan, Matrix<const T> w);

// Whether b [k, n], the right-hand side of a product with m rows, is read in place rather than packed.
template <class T>
bool reads_in_place(int64_t m, Matrix<const T> b);

// Bytes of workspace that a pass needs; 64-byte aligned memory is expected.
template <class T>
size_t forward_workspace(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass);
template <class T>
size_t backward_workspace(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass);

// x(l) = f(x(l-1) w(l)^T + b(l)) for all layers. The strides of pass.x are arbitrary; x(l) and s(l) have unit column
// stride.
template <class T>
void forward(const Kernels<T>& kernels, const Plan& plan, const Forward<T>& pass, const Parallel& parallel,
             void* workspace);

// dw, db and dx as far as they are wanted. The strides of dy, x and w are arbitrary.
template <class T>
void backward(const Kernels<T>& kernels, const Plan& plan, const Backward<T>& pass, const Parallel& parallel,
              void* workspace);

// The same for networks that are stored in 16 bits, whose other weights are always packed.
template <class S>
bool reads_rows(const HalfKernels<S>& kernels, const Plan& plan, Matrix<const S> w);
template <class S>
size_t forward_workspace(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass);
template <class S>
size_t backward_workspace(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass);
template <class S>
void forward(const HalfKernels<S>& kernels, const Plan& plan, const Forward<S>& pass, const Parallel& parallel,
             void* workspace);
template <class S>
void backward(const HalfKernels<S>& kernels, const Plan& plan, const Backward<S>& pass, const Parallel& parallel,
              void* workspace);

}  // namespace pyperc
