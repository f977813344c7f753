// The whole of a narrow network: forward in one kernel, backward with the gradients of all weights in one for a layer.
//
// Its layers are at most 128 wide. In 16 bits, or in float32 with products that round to TF32. Forward, a row
// stays in shared memory between the layers; backward, it goes through the workspace.
#pragma once

#include <cstddef>

#include "../core/mlp.h"
#include "device.h"

namespace pyperc::cuda {

constexpr int NARROW_WIDTH = 128, NARROW_DEPTH = 24;

template <class T>
struct NarrowLayer {
  int in, out;
  const T* w;  // [out, in], rows ld_w apart
  int64_t ld_w;
  const T* b;  // [out], or null
  Activation activation;
  Parameters parameters;
  // What is kept of the layer for backward, [batch, out]: s where the activation's derivative reads it, else x; of the
  // last layer x is the output itself. Null: not kept.
  T* kept;
  int64_t ld_kept;
};

template <class T>
struct NarrowForward {
  int64_t batch;
  const T* x;  // [batch, layers[0].in]
  int64_t ld_x;
  T* y;  // [batch, layers[depth - 1].out]
  int64_t ld_y;
  int depth;
  NarrowLayer<T> layers[NARROW_DEPTH];
};

template <class T>
struct NarrowBackward {
  int64_t batch;
  const T* x;
  int64_t ld_x;
  const T* dy;
  int64_t ld_dy;
  T* dx;  // null where not wanted
  int64_t ld_dx;
  int depth;
  NarrowLayer<T> layers[NARROW_DEPTH];
  T* dw[NARROW_DEPTH];  // [out, in] contiguous, or null
  T* db[NARROW_DEPTH];  // [out], or null
  void* workspace;      // narrow_workspace(...) bytes
};

// Whether a network of so many layers, none wider than `widest`, runs in these kernels. The same device gives the same
// bits.
template <class T>
bool is_narrow(int depth, int widest, const Device& device);

template <class T>
Status narrow_forward(const NarrowForward<T>& pass, const Device& device, Stream stream);
template <class T>
size_t narrow_workspace(const NarrowBackward<T>& pass, const Device& device);
template <class T>
Status narrow_backward(const NarrowBackward<T>& pass, const Device& device, Stream stream);

}  // namespace pyperc::cuda
