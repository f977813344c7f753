// What every launcher takes and returns.
#pragma once

namespace pyperc::cuda {

using Stream = void*;  // a cudaStream_t
using Status = int;    // a cudaError_t
constexpr Status SUCCESS = 0;

}  // namespace pyperc::cuda
