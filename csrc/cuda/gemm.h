// The three products of a layer, and what follows on each while its sums are still on the chip.
//
//   Activate       s = a b + bias,  c = f(s)             x w^T: the rows of a and the columns of b are read along k
//   Differentiate  c = (a b) * f'(saved),  db            ds w:  the rows of a along k, the rows of b along n
//   Nothing        c = a b                               ds^T x: the columns of a along m, the rows of b along n
//
// Other strides than these, and rows that do not begin at multiples of 16 bytes, are read element by element.
#pragma once

#include <cstddef>

#include "../core/mlp.h"
#include "status.h"

namespace pyperc::cuda {

enum class Epilogue { Nothing, Activate, Differentiate };

template <class T>
struct Gemm {
  int64_t m, n, k;
  Matrix<const T> a;  // [m, k]
  Matrix<const T> b;  // [k, n]
  T* c;               // [m, n], rows ldc apart
  int64_t ldc;
  Epilogue epilogue = Epilogue::Nothing;
  Activation activation = Activation::Identity;
  Parameters parameters = {};
  // Activate
  const T* bias = nullptr;  // [n], or null
  T* s = nullptr;           // [m, n], or null where nobody reads it
  int64_t ld_s = 0;
  // Differentiate
  const T* saved = nullptr;  // x or s, as the activation's Saved says; any address where it needs neither
  int64_t ld_saved = 0;
  T* db = nullptr;  // [n]: the column sums of c, in an order that the shape fixes; null where not wanted
  // Of float32: whether its products may round to TF32. The other formats have one way.
  bool tf32 = false;
  void* workspace = nullptr;  // gemm_workspace(...) bytes
};

template <class T>
size_t gemm_workspace(const Gemm<T>& product);
template <class T>
Status gemm(const Gemm<T>& product, Stream stream);

}  // namespace pyperc::cuda
