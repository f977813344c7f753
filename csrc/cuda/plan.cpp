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
  const int64_t nevertheless = layer.bytes == 2 ? t.library_widest_16 : 0, width = std::max(layer.in, layer.out);
  return nevertheless < width && width <= widest ? Path::Gemm : Path::Library;
}

bool plan_narrow(int bytes, int64_t widest, int64_t batch) {
  const Thresholds& t = thresholds();
  if (bytes != 2) return widest <= t.narrow_widest_tf32;
  return widest <= (batch < t.short_rows ? t.narrow_short_16 : t.narrow_widest_16);
}

const char* name_of(const LayerShape& layer) {
  if (plan(layer, Follows::Something) == Path::Library) return "cublas, elementwise passes";
  return plan(layer, Follows::Nothing) == Path::Gemm ? "gemm, all on the chip" : "gemm, all on the chip; dw by cublas";
}

}  // namespace pyperc::cuda
