// How the tests call what the emulator runs: C functions of plain numbers and pointers, found by name (emulator.py).
#pragma once

#include <cstdint>

#include "../../csrc/core/activations.h"
#include "../../csrc/core/half.h"

#define ENTRY extern "C" __attribute__((visibility("default")))

namespace pyperc::cuda {

// f(T{}) with the type that the tests call by this number: float32, float64, bfloat16, float16.
template <class F>
int visit(int64_t dtype, F f) {
  switch (dtype) {
    case 0: return f(float{});
    case 1: return f(double{});
    case 2: return f(BFloat16{});
    case 3: return f(Half{});
    default: return -1;
  }
}

inline Parameters parameters_of(const double* p) { return {{p[0], p[1]}}; }

}  // namespace pyperc::cuda
