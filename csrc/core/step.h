// What the kernels of a training step are given: plain structs; no torch, no ownership.
#pragma once

#include <cstdint>

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

// An optimiser's step of a whole weight, which a backward pass takes block by block.
template <class T>
struct Descent {
  UpdateFunction<T> function;
  Update<T> whole;  // without dw

  // Of rows [i, i + rows) and columns [j, j + columns), whose gradient lies at dw.
  void operator()(int64_t i, int64_t j, int64_t rows, int64_t columns, const T* dw, int64_t ld_dw) const {
    Update<T> block = whole;
    block.rows = rows;
    block.columns = columns;
    block.dw = dw;
    block.ld_dw = ld_dw;
    block.w += i * whole.ld_w + j;
    for (T*& state : block.state) {
      if (state) state += i * whole.ld_state + j;
    }
    function(block);
  }
};

// How a data set's numbers are stored.
enum class Stored { Float32, Float64, UInt8, BFloat16 };

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
