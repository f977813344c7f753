// How a launcher starts a kernel: on a device, or where the sources are compiled for the processor, on the emulator.
#pragma once

#include <tuple>

#include "primitives.cuh"
#include "status.h"

namespace pyperc::cuda {

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of dynamic shared memory
};

#if defined(__CUDACC__)

template <class... P, class... A>
Status launch(void (*kernel)(P...), const Grid& grid, Stream stream, const A&... arguments) {
  if (grid.blocks == 0) return SUCCESS;
  if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared > (48 << 10)) {  // more than a kernel may have without asking
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
    if (error != cudaSuccess) return error;
  }
  std::tuple<P...> values(arguments...);
  return std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        return cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid.blocks)),
                                dim3(static_cast<unsigned>(grid.threads)), pointers, grid.shared,
                                static_cast<cudaStream_t>(stream));
      },
      values);
}

#else

template <class... P, class... A>
Status launch(void (*kernel)(P...), const Grid& grid, Stream, const A&... arguments) {
  if (grid.blocks == 0) return SUCCESS;
  return emulate::launch([&] { kernel(arguments...); }, grid.blocks, grid.threads, grid.shared);
}

#endif

}  // namespace pyperc::cuda
