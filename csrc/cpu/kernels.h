// What an ISA offers: a table of functions over plain structs, one table per element type.
#pragma once

#include "../core/half.h"
#include "../core/linear_model.h"
#include "../core/mlp.h"

namespace pyperc {

// The microkernel's tile. A tile of `vectors` vectors has at most rows(vectors) rows.
struct Tile {
  int mr;            // rows of the tallest tile
  int accumulators;  // rows x vectors at most
  int width;         // elements of a vector

  static constexpr int WIDEST = 8;
  static constexpr int MOST_ELEMENTS = 1024;  // of any tile of any ISA
  PYPERC_INLINE constexpr int rows(int vectors) const {
    return accumulators / vectors < mr ? accumulators / vectors : mr;
  }
  PYPERC_INLINE constexpr int nr() const { return width * (accumulators / mr); }
  // The widest tile that still takes all m rows at once: a short tile needs many columns to hide the latency of its
  // sums.
  PYPERC_INLINE constexpr int vectors(int64_t m) const {
    int v = WIDEST;
    while (v > accumulators / mr && rows(v) < m) v /= 2;
    return v;
  }
};

enum class After { Nothing, Activate, Differentiate };

// Elementwise over a rows x columns block:
//   activate       out = f(in)
//   differentiate  out = in * f'(saved), db += column sums of out where db is not null
// `saved` points at readable memory even where f' reads nothing. Where a differentiated
// identity has ld_out = 0, nobody reads out, which is one row.
template <class T>
struct Map {
  int64_t rows, columns;
  const T* in;
  int64_t ld_in;
  T* out;
  int64_t ld_out;
  const T* saved;
  int64_t ld_saved;
  T* db;
  Parameters parameters;
};
template <class T>
using MapFunction = void (*)(const Map<T>&);

// In blocks of so many rows db is summed of rows shorter than a vector: pieces of a batch in whole blocks change no
// bit.
inline constexpr int64_t SHORT_ROWS = 64;

//   c = init + a b, then what `after` says, per tile while it is in the first-level cache:
//   Activate       x = f(c); x may be c
//   Differentiate  x = c * f'(saved), db += column sums of x; a null x is c
// then `finished`, which sees every tile of c once. E is the type of the operands, T that of the sums; k counts
// operands.
template <class E, class T = Sum<E>>
struct Gemm {
  int64_t m, n, k;
  Matrix<const E> a;   // [m, k], one of its strides is 1
  const E* b;          // [k, n]: unit column stride and row stride ldb; or packed in panels of `panel` columns
  int64_t ldb, panel;  // panel > 0: panel q begins at b + q * ldb and holds rows of `panel` elements
  T* c;                // null where it is only read to make x, or by `finished`, and k <= kc: one tile at a time, then
  int64_t ldc;
  const T* init;  // null: zero; row stride ld_init: 0 for a bias, ldc to add to c
  int64_t ld_init;
  After after = After::Nothing;
  Activation activation = Activation::Identity;
  Parameters parameters = {};
  T* x = nullptr;
  int64_t ldx = 0;
  const T* saved = nullptr;
  int64_t ld_saved = 0;
  T* db = nullptr;
  E* a_block = nullptr;  // room for `Kernels::a_block` elements where a's columns are contiguous and lie far apart
  // Rows [i, i + rows) and columns [j, j + columns) of c.
  void (*finished)(void* context, T* c, int64_t ldc, int64_t i, int64_t j, int64_t rows, int64_t columns) = nullptr;
  void* context = nullptr;
};

template <class T>
struct Kernels {
  Tile tile;
  int64_t kc;       // depth of a cache block
  int64_t a_block;  // elements of a block of a
  void (*gemm)(const Gemm<T>&);
  // The same for few rows, with b given as its transpose [n, k], row stride ldb, unit column stride: no packing.
  void (*dot)(const Gemm<T>&);
  // Packs b [k, n] of any strides into panels of `panel` columns, each k x panel, one after the other.
  void (*pack)(Matrix<const T> b, int64_t k, int64_t n, int64_t panel, T* packed);
  MapFunction<T> activate[ACTIVATION_COUNT];
  MapFunction<T> differentiate[ACTIVATION_COUNT];
  LossFunction<T> losses[LOSS_COUNT];
  void (*linear_rows)(LinearRows<T>&);
  void (*perceptron_rows)(PerceptronRows<T>&);
  void (*dual_descent)(DualDescent<T>&);
  // By the number of live states.
  UpdateFunction<T> (*update[OPTIMIZER_COUNT])(int live);
  double (*sum_of_squares)(Matrix<const T> x, int64_t rows, int64_t columns);
  void (*gather)(const Gather<T>&);
  void (*dropout)(const Dropout<T>&);
};

// Products of matrices that are stored as S and multiplied as E.
template <class S, class E>
struct OperandKernels {
  int64_t kc;
  void (*gemm)(const Gemm<E>&) = nullptr;
  // c [m, n] = init + a b^T for few rows, b [n, k] in place with row stride ldb. k counts terms, not operands: a
  // has zeros up to a whole number of operands.
  void (*dot)(const Gemm<E>&, const S* b) = nullptr;
  // Packs b [k, n] of any strides as `Kernels::pack` does, k counting terms; a last operand that they do not fill is
  // filled with zero.
  void (*pack)(Matrix<const S> b, int64_t k, int64_t n, int64_t panel, E* packed) = nullptr;
};

// The kernels of a 16-bit format. What stands between products is float32.
template <class S>
struct HalfKernels {
  Tile tile;
  // One of them, whichever the ISA has; the other is null.
  OperandKernels<S, float> widened;
  OperandKernels<S, Pair> paired;
  const MapFunction<float>* activate;
  const MapFunction<float>* differentiate;
  // out = in, over rows x columns; narrow rounds to nearest, ties to even.
  void (*widen)(int64_t rows, int64_t columns, const S* in, int64_t ld_in, float* out, int64_t ld_out);
  void (*narrow)(int64_t rows, int64_t columns, const float* in, int64_t ld_in, S* out, int64_t ld_out);

  template <class E>
  const OperandKernels<S, E>& products() const {
    if constexpr (Operands<E>::TERMS == 2) {
      return paired;
    } else {
      return widened;
    }
  }
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  const Kernels<float>& f32;
  const Kernels<double>& f64;
  const HalfKernels<BFloat16>& bf16;
  const HalfKernels<Half>& f16;
  double (*probe)(double seconds);  // FMA peak of the calling thread, flop/s in float32

  const auto& kernels(float) const { return f32; }
  const auto& kernels(double) const { return f64; }
  const auto& kernels(BFloat16) const { return bf16; }
  const auto& kernels(Half) const { return f16; }
};

}  // namespace pyperc
