// The products of one dtype.
#include "gemm.cuh"

namespace pyperc::cuda {
PYPERC_GEMM(Half)
}  // namespace pyperc::cuda
