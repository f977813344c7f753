// What is asked of the CUDA runtime.
#pragma once

#include "status.h"

namespace pyperc::cuda {

// Ten times the major compute capability and the minor one: 90 for Hopper. 0 where there is no such device.
int capability(int device);

const char* describe(Status status);

}  // namespace pyperc::cuda
