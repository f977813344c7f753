// What a backend is given: plain structs of pointers, sizes and strides; no torch, no ownership.
#pragma once

#include <cstddef>
#include <cstdint>

#include "activations.h"
#include "step.h"

namespace pyperc {

// Element (i, j) lies at data[i * rs + j * cs].
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t rs = 0, cs = 0;
};

// How a backend runs tasks in parallel: calls task(context, i) for each i in [0, n) and returns when all are done.
struct Parallel {
  int threads;
  void (*run)(int64_t n, void (*task)(void* context, int64_t i), void* context);
};

struct LayerSpec {
  int64_t in, out;
  Activation activation;
  Parameters parameters;
};

// One layer of a forward pass over a batch:  s = x w^T + b,  x_out = f(s).
template <class T>
struct ForwardLayer {
  LayerSpec spec;
  Matrix<const T> w;     // [out, in]
  const T* b = nullptr;  // [out], or null
  Matrix<T> s;           // [batch, out] where backward reads s and x is another buffer; else null
  Matrix<T> x;           // [batch, out]; null for a hidden layer whose output nobody keeps
};

template <class T>
struct Forward {
  int64_t batch;
  Matrix<const T> x;  // [batch, layers[0].in]
  const ForwardLayer<T>* layers;
  int depth;
};

// One layer of a backward pass:  ds = dx * f'(s),  dw = ds^T x_in,  db = column sums of ds,  dx_in = ds w.
template <class T>
struct BackwardLayer {
  LayerSpec spec;
  Matrix<const T> w;      // [out, in]
  Matrix<const T> x;      // [batch, in], the layer's input; null: f(s) of the layer below, whose `saved` is s
  Matrix<const T> saved;  // [batch, out]: x or s of this layer, as Saved says; null where f' needs neither
  Matrix<T> ds;           // [batch, out]: where ds may go once the layer above has its dw: what was kept of this layer,
                          // x or s, where nobody reads it again; else null
  bool wants_dw = false;
  T* dw = nullptr;                      // [out, in] contiguous, where wanted; read after Memory::begin
  const Descent<T>* descent = nullptr;  // instead of dw: w is updated, as soon as nobody reads it
  T* db = nullptr;                      // [out], or null where not wanted
};

template <class T>
struct Backward {
  int64_t batch;
  Matrix<const T> dy;  // [batch, layers[depth - 1].out]
  bool wants_dx;
  Matrix<T> dx;  // [batch, layers[0].in], where wanted; read after Memory::begin_dx
  const BackwardLayer<T>* layers;
  int depth;
};

// Where a pass gets its workspace, and what the owner of a backward pass is told so that no buffer lives longer than it
// must. All calls come from the thread that called the pass.
struct Memory {
  virtual void* take(size_t bytes) = 0;  // aligned to 64 bytes
  virtual void give_back(void* memory) = 0;
  virtual void begin(int) {}  // dw of layer l is about to be written
  virtual void begin_dx() {}  // dx is
  virtual void end(int) {}    // what was kept of layer l is not read again

 protected:
  ~Memory() = default;
};

}  // namespace pyperc
