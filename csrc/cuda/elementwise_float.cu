// The elementwise kernels of one dtype.
#include "elementwise.cuh"

namespace pyperc::cuda {
PYPERC_ELEMENTWISE(float)
}  // namespace pyperc::cuda
