// What is asked of the CUDA runtime.
#pragma once

#include <cstddef>

#include "status.h"

namespace pyperc::cuda {

// Ten times the major compute capability and the minor one: 90 for Hopper. 0 where there is no such device.
int capability(int device);

// What it has; `shared` is the memory that a block may ask for, in bytes.
struct Device {
  int multiprocessors;
  size_t shared;
};
Device device_of(int device);

// For this thread's launches. The runtime that is linked in keeps a current device of its own beside torch's.
Status make_current(int device);

const char* describe(Status status);

}  // namespace pyperc::cuda
