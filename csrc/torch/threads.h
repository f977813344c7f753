// Torch's own threads, as the kernels take them.
#pragma once

#include <ATen/Parallel.h>

#include "../core/mlp.h"

namespace pyperc {

// Inside a parallel region, and for one thread, the tasks run here one after the other.
inline Parallel torch_threads() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          [](int64_t n, void (*task)(void*, int64_t), void* context) {
            at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(context, i);
            });
          }};
}

}  // namespace pyperc
