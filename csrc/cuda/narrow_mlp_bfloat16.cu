// The narrow network of one dtype.
#include "narrow_mlp.cuh"

namespace pyperc::cuda {
PYPERC_NARROW(BFloat16)
}  // namespace pyperc::cuda
