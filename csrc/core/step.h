// What the kernels of a training step are given: plain structs; no torch, no ownership.
#pragma once

#include <cstdint>

#include "linear_model.h"
#include "optimizers.h"
#include "random.h"

namespace pyperc {

// One step of an optimiser over a rows x columns block of a parameter: w and its states from dw.
template <class T>
struct Update {
  int64_t rows, columns;
  const T* dw;
  int64_t ld_dw;
  T* w;
  int64_t ld_w;
  T* state[MAX_STATES];  // the live ones, ld_state apart
  int64_t ld_state;
  Coefficients coefficients;
};
template <class T>
using UpdateFunction = void (*)(const Update<T>&);

// How a data set's numbers are stored.
enum class Stored { Float32, Float64, UInt8 };

// Rows of a data set as they are wanted: out(i, j) = in(order[i], j) * scale[j] + shift[j].
template <class T>
struct Gather {
  int64_t rows, columns;
  const void* in;
  Stored stored;
  int64_t ld_in;
  const int64_t* order;    // null: 0, 1, 2, ...
  const T *scale, *shift;  // [columns]; both null: 1 and 0
  T* out;
  int64_t ld_out;
};

// Elements whose bits are below `threshold` are dropped, the others multiplied by `scale`. Forward: x. Backward: dx,
// while what was done to the kept elements of x is taken back.
template <class T>
struct Dropout {
  int64_t first, rows, columns;  // rows [first, first + rows) of the batch
  T* x;
  int64_t ld_x;
  T* dx;  // null: forward
  int64_t ld_dx;
  uint64_t seed, layer;
  uint32_t threshold;
  T scale;
};

}  // namespace pyperc
