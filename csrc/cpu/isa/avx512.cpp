// The kernels for AVX-512 (F, DQ, BW, VL).
#include "../isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif

#include "../kernels.h"

namespace pyperc::avx512 {
namespace {

#include "avx512.inl"

template <class S>
constexpr bool HAS_PAIRS = false;

#include "../isa_kernels.inl"

bool runs_here() { return has_avx512(); }

}  // namespace

extern const Isa isa;
const Isa isa = {"avx512",
                 runs_here,
                 make_kernels<float>(),
                 make_kernels<double>(),
                 make_half_kernels<BFloat16>(),
                 make_half_kernels<Half>(),
                 probe};

}  // namespace pyperc::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
