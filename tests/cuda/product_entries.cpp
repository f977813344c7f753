// Calls of the small product.
#include "entries.h"
#include "product.cuh"

using namespace pyperc;

ENTRY int small_product(int64_t dtype, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b,
                        int64_t ldb, float* c, int64_t ldc) {
  return cuda::visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) > 4) {
      return -1;
    } else {
      return cuda::small_product<T>({m, n, k, static_cast<const T*>(a), lda, static_cast<const T*>(b), ldb, c, ldc},
                                    nullptr);
    }
  });
}
