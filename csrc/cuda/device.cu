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

Device device_of(int device) {
  int multiprocessors = 0, shared = 0;
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return {};
  }
  return {multiprocessors, static_cast<size_t>(shared)};
}

Status make_current(int device) { return cudaSetDevice(device); }

const char* describe(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

#else

int capability(int) { return 90; }

// So few that a block has several tiles of rows.
Device device_of(int) { return {2, 227 << 10}; }

Status make_current(int) { return SUCCESS; }

const char* describe(Status) { return emulate::message().c_str(); }

#endif

}  // namespace pyperc::cuda
