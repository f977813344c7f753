// What is asked of the CUDA runtime; on the emulator, of nobody.
#include "device.h"

#include "primitives.cuh"

namespace pyperc::cuda {

#if defined(__CUDACC__)

int capability(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return 0;
  }
  return 10 * major + minor;
}

const char* describe(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

#else

int capability(int) { return 90; }

const char* describe(Status) { return emulate::message().c_str(); }

#endif

}  // namespace pyperc::cuda
