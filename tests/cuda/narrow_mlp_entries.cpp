// Calls of the narrow network. A layer is ten numbers: in, out, the addresses and row strides of its parts, its
// activation; and two parameters.
#include "../../csrc/cuda/narrow_mlp.h"
#include "entries.h"

using namespace pyperc;

namespace {

enum { IN, OUT, WEIGHT, LD_WEIGHT, BIAS, ACTIVATION, KEPT, LD_KEPT, DW, DB, NUMBERS };

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

template <class T>
void set_layers(cuda::NarrowLayer<T>* layers, int64_t depth, const int64_t* numbers, const double* parameters) {
  for (int64_t l = 0; l < depth; ++l, numbers += NUMBERS) {
    layers[l] = {static_cast<int>(numbers[IN]),
                 static_cast<int>(numbers[OUT]),
                 pointer<T>(numbers[WEIGHT]),
                 numbers[LD_WEIGHT],
                 pointer<T>(numbers[BIAS]),
                 static_cast<Activation>(numbers[ACTIVATION]),
                 cuda::parameters_of(parameters + 2 * l),
                 pointer<T>(numbers[KEPT]),
                 numbers[LD_KEPT]};
  }
}

template <class T>
cuda::NarrowBackward<T> backward_of(int64_t batch, int64_t depth, const int64_t* numbers, const double* parameters) {
  cuda::NarrowBackward<T> g{};
  g.batch = batch;
  g.depth = static_cast<int>(depth);
  set_layers(g.layers, depth, numbers, parameters);
  for (int64_t l = 0; l < depth; ++l) {
    g.dw[l] = pointer<T>(numbers[l * NUMBERS + DW]);
    g.db[l] = pointer<T>(numbers[l * NUMBERS + DB]);
  }
  return g;
}

template <class F>
int visit(int64_t dtype, F f) {
  return cuda::visit(dtype, [&](auto zero) {
    if constexpr (sizeof(zero) > 4) {
      return -1;
    } else {
      return f(zero);
    }
  });
}

}  // namespace

ENTRY int narrow_forward(int64_t dtype, int64_t batch, int64_t depth, const int64_t* layers, const double* parameters,
                         const void* x, int64_t ld_x, void* y, int64_t ld_y, int64_t multiprocessors, int64_t shared) {
  return visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::NarrowForward<T> g{batch, static_cast<const T*>(x), ld_x, static_cast<T*>(y),
                             ld_y,  static_cast<int>(depth),  {}};
    set_layers(g.layers, depth, layers, parameters);
    return cuda::narrow_forward(g, {static_cast<int>(multiprocessors), static_cast<size_t>(shared)}, nullptr);
  });
}

ENTRY int64_t narrow_workspace(int64_t dtype, int64_t batch, int64_t depth, const int64_t* layers,
                               const double* parameters, int64_t multiprocessors, int64_t shared) {
  int64_t bytes = 0;
  visit(dtype, [&](auto zero) {
    const auto g = backward_of<decltype(zero)>(batch, depth, layers, parameters);
    bytes = static_cast<int64_t>(
        cuda::narrow_workspace(g, {static_cast<int>(multiprocessors), static_cast<size_t>(shared)}));
    return 0;
  });
  return bytes;
}

ENTRY int narrow_backward(int64_t dtype, int64_t batch, int64_t depth, const int64_t* layers, const double* parameters,
                          const void* x, int64_t ld_x, const void* dy, int64_t ld_dy, void* dx, int64_t ld_dx,
                          void* workspace, int64_t multiprocessors, int64_t shared) {
  return visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto g = backward_of<T>(batch, depth, layers, parameters);
    g.x = static_cast<const T*>(x);
    g.ld_x = ld_x;
    g.dy = static_cast<const T*>(dy);
    g.ld_dy = ld_dy;
    g.dx = static_cast<T*>(dx);
    g.ld_dx = ld_dx;
    g.workspace = workspace;
    return cuda::narrow_backward(g, {static_cast<int>(multiprocessors), static_cast<size_t>(shared)}, nullptr);
  });
}
