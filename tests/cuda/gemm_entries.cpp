// Calls of the products.
#include "../../csrc/cuda/gemm.h"
#include "entries.h"

using namespace pyperc;

namespace {

template <class T>
cuda::Gemm<T> product_of(int64_t epilogue, int64_t m, int64_t n, int64_t k, int64_t tf32) {
  cuda::Gemm<T> g{m, n, k, {}, {}, nullptr, 0};
  g.epilogue = static_cast<cuda::Epilogue>(epilogue);
  g.tf32 = tf32 != 0;
  return g;
}

}  // namespace

ENTRY int64_t gemm_workspace(int64_t dtype, int64_t epilogue, int64_t m, int64_t n, int64_t k, int64_t tf32) {
  int64_t bytes = 0;
  cuda::visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto g = product_of<T>(epilogue, m, n, k, tf32);
    T wanted{};
    g.db = &wanted;
    bytes = static_cast<int64_t>(cuda::gemm_workspace(g));
    return 0;
  });
  return bytes;
}

ENTRY int gemm(int64_t dtype, int64_t epilogue, int64_t activation, const double* parameters, int64_t m, int64_t n,
               int64_t k, const void* a, int64_t a_rs, int64_t a_cs, const void* b, int64_t b_rs, int64_t b_cs, void* c,
               int64_t ldc, const void* bias, void* s, int64_t ld_s, const void* saved, int64_t ld_saved, void* db,
               int64_t tf32, void* workspace) {
  return cuda::visit(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto g = product_of<T>(epilogue, m, n, k, tf32);
    g.a = {static_cast<const T*>(a), a_rs, a_cs};
    g.b = {static_cast<const T*>(b), b_rs, b_cs};
    g.c = static_cast<T*>(c);
    g.ldc = ldc;
    g.activation = static_cast<Activation>(activation);
    g.parameters = cuda::parameters_of(parameters);
    g.bias = static_cast<const T*>(bias);
    g.s = static_cast<T*>(s);
    g.ld_s = ld_s;
    g.saved = static_cast<const T*>(saved);
    g.ld_saved = ld_saved;
    g.db = static_cast<T*>(db);
    g.workspace = workspace;
    return cuda::gemm(g, nullptr);
  });
}
