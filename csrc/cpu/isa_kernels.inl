// All kernels of one ISA, from the constants and the partial loads and stores that its file defines, and their table.
// Included inside the anonymous namespace of an ISA file. Everything is local to that file: an inline function with
// external linkage, compiled for AVX-512, could be the copy that the linker keeps for every processor.

// Each stands on the one before.
// clang-format off
namespace math {
#include "math.inl"
}
#include "value.inl"
#include "map.inl"
#include "gemm.inl"
#include "dot.inl"
#include "pack.inl"
#include "linear_model.inl"
#include "step.inl"
#include "half.inl"
// clang-format on

template <class T>
constexpr Kernels<T> make_kernels() {
  Kernels<T> k{tile_of(WIDTH<T>), KC, MC<T> * KC, gemm<T>, dot<T>, pack<T>};
  for (int i = 0; i < ACTIVATION_COUNT; ++i) {
    k.activate[i] = ACTIVATE<T>[i];
    k.differentiate[i] = DIFFERENTIATE<T>[i];
  }
  for (int i = 0; i < LOSS_COUNT; ++i) k.losses[i] = LOSSES<T>[i];
  k.linear_rows = linear_rows<T>;
  k.perceptron_rows = perceptron_rows<T>;
  k.dual_descent = dual_descent<T>;
#define X(O) k.update[static_cast<int>(Optimizer::O)] = update_of<T, pyperc::O>;
  PYPERC_OPTIMIZERS(X)
#undef X
  k.sum_of_squares = sum_of_squares<T>;
  k.gather = gather<T>;
  k.dropout = dropout<T>;
  return k;
}

template <class T>
constexpr Kernels<T> KERNELS = make_kernels<T>();
template <class S>
constexpr HalfKernels<S> HALF_KERNELS = make_half_kernels<S>();

double seconds_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// The peak that speed is measured against: fused multiply-adds on as many sums as the microkernel keeps, nothing else.
double probe(double seconds) {
  Vector<float> acc[ACCUMULATORS];
  PYPERC_UNROLL
  for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = splat<Vector<float>>(1.0f + static_cast<float>(i));
  const Vector<float> a = splat<Vector<float>>(0.999f), b = splat<Vector<float>>(0.001f);
  const double begin = seconds_now();
  double flops = 0, elapsed = 0;
  do {
    for (int step = 0; step < 4000; ++step) {
      PYPERC_UNROLL
      for (int i = 0; i < ACCUMULATORS; ++i) acc[i] = fma(acc[i], a, b);
      PYPERC_UNROLL
      for (int i = 0; i < ACCUMULATORS; ++i) asm volatile("" : "+x"(acc[i]));
    }
    flops += 4000.0 * 2 * ACCUMULATORS * WIDTH<float>;
    elapsed = seconds_now() - begin;
  } while (elapsed < seconds);
  return flops / elapsed;
}
