// Which kernels take a network, or the products of a layer: one table.
#pragma once

#include <cstdint>

namespace pyperc::cuda {

// Gemm: the kernels of gemm.h, bias, activation and f' on the chip. Library: torch's own product (cuBLAS), with the
// elementwise kernels around it.
enum class Path { Gemm, Library };

// narrow_widest   the widest layer of a network that runs in one kernel (narrow_mlp.h)
// gemm_widest_..  the widest layer, in or out, whose products cost less by our kernels than by cuBLAS, which multiplies
//                 faster, and the passes over memory around it
// From counts of operations and bytes on a Hopper GPU; not measured yet.
#define PYPERC_CUDA_THRESHOLDS(X) \
  X(narrow_widest, 128)           \
  X(gemm_widest_16, 512)          \
  X(gemm_widest_tf32, 384)        \
  X(gemm_widest_32, 192)          \
  X(gemm_widest_64, 128)

struct Thresholds {
#define X(name, value) int64_t name = value;
  PYPERC_CUDA_THRESHOLDS(X)
#undef X
};
Thresholds& thresholds();

struct LayerShape {
  int bytes;  // of an element
  bool tf32;  // of float32: whether products may round to TF32
  int64_t in, out;
};

Path plan(const LayerShape& layer);
const char* name_of(Path path);

}  // namespace pyperc::cuda
