// Which kernels take a network, or the products of a layer: one table.
#pragma once

#include <cstdint>

namespace pyperc::cuda {

// Gemm: the kernels of gemm.h, bias, activation and f' on the chip. Library: torch's own product (cuBLAS), with the
// elementwise kernels around it.
enum class Path { Gemm, Library };

// What a product does beside multiplying: bias and f, or f' and db; or nothing, as for dw and for the input's gradient.
enum class Follows { Something, Nothing };

// Estimates: no kernel has run on a GPU yet. What they assume of an H200, in 16 bits, TF32, float32 and float64:
//
//   cuBLAS        780, 390, 50, 55 TFLOP/s    a reading in 16 bits; the others by the datasheet's proportions
//   our kernels   400, 200, 35, 20 TFLOP/s    mma.sync, about half of what wgmma gives; the ordinary cores
//   memory        4.3 TB/s                    a reading of a copy
//
// By row of the batch and layer of width w: a product takes 2 w^2 operations, or as long as reading one row and writing
// one, where that is longer; the pass for bias and f takes as long as two rows, the one for f' and db as three. Over a
// step cuBLAS saves 6 w^2 (1 / ours - 1 / its) and costs those five rows of passes: both are equal at w = 320, 320, 90
// and 50, and at 380, 380, 110 and 60 for forward alone. Where nothing follows on a product, ours costs no more only as
// long as memory decides, up to w = 190, 190, 33 and 37. An A100 has half of each rate, and so the same widths.
// The narrow kernels read the input and write the output where each layer would read and write a row, and are 3
// launches of 2 us for a step, not 5 or more for each layer: nothing speaks against them where they fit.
//
// narrow_widest   the widest layer of a network that runs in one kernel (narrow_mlp.h): as wide as it can be
// gemm_widest_..  the widest layer, in or out, whose products are ours where something follows on them
// plain_widest_.. and where nothing does
#define PYPERC_CUDA_THRESHOLDS(X) \
  X(narrow_widest, 128)           \
  X(gemm_widest_16, 384)          \
  X(gemm_widest_tf32, 384)        \
  X(gemm_widest_32, 96)           \
  X(gemm_widest_64, 64)           \
  X(plain_widest_16, 192)         \
  X(plain_widest_tf32, 192)       \
  X(plain_widest_32, 32)          \
  X(plain_widest_64, 32)

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

Path plan(const LayerShape& layer, Follows follows);
// Of the layer: what takes its products.
const char* name_of(const LayerShape& layer);

}  // namespace pyperc::cuda
