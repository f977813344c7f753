// The products of one dtype.
#include "gemm.cuh"

namespace pyperc::cuda {
PYPERC_GEMM(BFloat16)
}  // namespace pyperc::cuda
