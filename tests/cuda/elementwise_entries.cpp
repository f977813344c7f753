// Calls of the elementwise passes.
#include "../../csrc/cuda/elementwise.h"
#include "entries.h"

using namespace pyperc;

ENTRY int activate(int64_t dtype, int64_t activation, const double* parameters, int64_t rows, int64_t columns,
                   const void* s, int64_t ld_s, void* x, int64_t ld_x) {
  return cuda::visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    return cuda::activate<T>({rows, columns, static_cast<const T*>(s), ld_s, static_cast<T*>(x), ld_x,
                              static_cast<Activation>(activation), cuda::parameters_of(parameters)},
                             nullptr);
  });
}

ENTRY int64_t differentiate_workspace(int64_t dtype, int64_t rows, int64_t columns) {
  int64_t bytes = 0;
  cuda::visit(dtype, [&](auto zero) {
    bytes = static_cast<int64_t>(cuda::differentiate_workspace<decltype(zero)>(rows, columns));
    return 0;
  });
  return bytes;
}

ENTRY int differentiate(int64_t dtype, int64_t activation, const double* parameters, int64_t rows, int64_t columns,
                        const void* dx, int64_t ld_dx, const void* saved, int64_t ld_saved, void* ds, int64_t ld_ds,
                        void* x, int64_t ld_x, void* db, void* workspace) {
  return cuda::visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    return cuda::differentiate<T>({rows, columns, static_cast<const T*>(dx), ld_dx, static_cast<const T*>(saved),
                                   ld_saved, static_cast<T*>(ds), ld_ds, static_cast<T*>(x), ld_x, static_cast<T*>(db),
                                   workspace, static_cast<Activation>(activation), cuda::parameters_of(parameters)},
                                  nullptr);
  });
}
