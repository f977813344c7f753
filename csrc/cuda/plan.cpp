// The table, looked up.
#include "plan.h"

#include <algorithm>

namespace pyperc::cuda {

Thresholds& thresholds() {
  static Thresholds table;
  return table;
}

Path plan(const LayerShape& layer, Follows follows) {
  const Thresholds& t = thresholds();
  const bool plain = follows == Follows::Nothing;
  const int64_t widest = layer.bytes == 2   ? (plain ? t.plain_widest_16 : t.gemm_widest_16)
                         : layer.bytes == 8 ? (plain ? t.plain_widest_64 : t.gemm_widest_64)
                         : layer.tf32       ? (plain ? t.plain_widest_tf32 : t.gemm_widest_tf32)
                                            : (plain ? t.plain_widest_32 : t.gemm_widest_32);
  return std::max(layer.in, layer.out) <= widest ? Path::Gemm : Path::Library;
}

const char* name_of(const LayerShape& layer) {
  if (plan(layer, Follows::Something) == Path::Library) return "cublas, elementwise passes";
  return plan(layer, Follows::Nothing) == Path::Gemm ? "gemm, all on the chip" : "gemm, all on the chip; dw by cublas";
}

}  // namespace pyperc::cuda
