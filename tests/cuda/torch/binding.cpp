// The CUDA backend as it registered itself in this library, whose kernels are the emulated ones.
#include "../../../csrc/torch/backend.h"

extern "C" __attribute__((visibility("default"))) void emulated_backend(pyperc::Backend* backend) {
  *backend = *pyperc::find_backend(c10::DeviceType::CUDA);
}
