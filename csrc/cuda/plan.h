// Which kernels take a network, or the products of a layer: one table.
#pragma once

#include <cstdint>

namespace pyperc::cuda {

// Gemm: the kernels of gemm.h, bias, activation and f' on the chip. Library: torch's own product (cuBLAS), with the
// elementwise kernels around it.
enum class Path { Gemm, Library };

// What a product does beside multiplying: bias and f, or f' and db; or nothing, as for dw and for the input's gradient.
enum class Follows { Something, Nothing };

// Measured on an H100 (bench/gpu.py, the rows "plan" of bench/results/h100/): a step of three layers of one width,
// forward and backward without the input's gradient, batch 2^10, 2^14 and 2^18.
//
// narrow_widest_..   the widest layer of a network that runs in the kernels of narrow_mlp.h. In 16 bits they take 0.49
//                    to 0.78 of the next best time up to 64, and 0.70 of it at 128 with 2^18 rows. TF32: 0.51 to 0.88
//                    up to 64, more than it at 128
// narrow_short_16    the same for a batch of less than short_rows: at 128 1.12 with 2^14 and 1.22 with 2^10
// gemm_widest_..     the widest layer, in or out, whose products are ours where something follows on them. In 16 bits
//                    ours take 0.87 to 0.96 of the library's time at 128 and 1.05 to 1.10 at 256; in TF32, float32 and
//                    float64 up to 2.4 times as long, and where less, with few rows or within a tenth
// library_widest_16  the widest whose products are nevertheless the library's: with 2^18 rows ours take 1.2 times as
//                    long at 64 and 1.8 at 16, and 0.86 to 1.03 with fewer
// plain_widest_..    and where nothing follows, as for dw: a step with ours takes 1.1 to 4 times as long from 16 on
#define PYPERC_CUDA_THRESHOLDS(X) \
  X(narrow_widest_16, 128)        \
  X(narrow_widest_tf32, 64)       \
  X(narrow_short_16, 64)          \
  X(short_rows, 1 << 15)          \
  X(gemm_widest_16, 128)          \
  X(gemm_widest_tf32, 0)          \
  X(gemm_widest_32, 0)            \
  X(gemm_widest_64, 0)            \
  X(library_widest_16, 64)        \
  X(plain_widest_16, 0)           \
  X(plain_widest_tf32, 0)         \
  X(plain_widest_32, 0)           \
  X(plain_widest_64, 0)

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
// Whether a network whose layers are at most so wide runs in the kernels of narrow ones, as far as they can hold it.
bool plan_narrow(int bytes, int64_t widest, int64_t batch);
// Of the layer: what takes its products.
const char* name_of(const LayerShape& layer);

}  // namespace pyperc::cuda
