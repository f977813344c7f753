// The elementwise passes over a matrix: x = f(s), and ds = dx * f'(s) with db. Rows lie ld_... apart.
#pragma once

#include <cstddef>

#include "../core/mlp.h"
#include "status.h"

namespace pyperc::cuda {

template <class T>
struct Activate {
  int64_t rows, columns;
  const T* s;
  int64_t ld_s;
  T* x;  // may be s
  int64_t ld_x;
  Activation activation;
  Parameters parameters;
};

template <class T>
struct Differentiate {
  int64_t rows, columns;
  const T* dx;
  int64_t ld_dx;
  const T* saved;  // x or s, as the activation's Saved says; any address where it needs neither
  int64_t ld_saved;
  T* ds;  // may be dx; null where not wanted
  int64_t ld_ds;
  T* x;  // f(saved) once more, of an activation with Saved::Summation; null where not wanted
  int64_t ld_x;
  T* db;            // [columns]: the column sums of ds, in an order that the shape fixes; null where not wanted
  void* workspace;  // differentiate_workspace(...) bytes where db is wanted
  Activation activation;
  Parameters parameters;
};

template <class T>
Status activate(const Activate<T>& pass, Stream stream);

template <class T>
size_t differentiate_workspace(int64_t rows, int64_t columns);
template <class T>
Status differentiate(const Differentiate<T>& pass, Stream stream);

}  // namespace pyperc::cuda
