// The table, looked up.
#include "plan.h"

#include <algorithm>

namespace pyperc::cuda {

Thresholds& thresholds() {
  static Thresholds table;
  return table;
}

Path plan(const LayerShape& layer) {
  const Thresholds& t = thresholds();
  const int64_t widest = layer.bytes == 2   ? t.gemm_widest_16
                         : layer.bytes == 8 ? t.gemm_widest_64
                         : layer.tf32       ? t.gemm_widest_tf32
                                            : t.gemm_widest_32;
  return std::max(layer.in, layer.out) <= widest ? Path::Gemm : Path::Library;
}

const char* name_of(Path path) {
  switch (path) {
    case Path::Gemm: return "gemm, all on the chip";
    case Path::Library: return "cublas, elementwise passes";
  }
  return "";
}

}  // namespace pyperc::cuda
