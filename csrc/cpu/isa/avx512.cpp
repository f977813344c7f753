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

// Those that avx512_bf16.cpp shares.
extern const Kernels<float> f32;
extern const Kernels<double> f64;
extern const HalfKernels<Half> f16;
const Kernels<float> f32 = make_kernels<float>();
const Kernels<double> f64 = make_kernels<double>();
const HalfKernels<Half> f16 = make_half_kernels<Half>();

extern const Isa isa;
const Isa isa = {"avx512", runs_here, f32, f64, HALF_KERNELS<BFloat16>, f16, probe};

}  // namespace pyperc::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
