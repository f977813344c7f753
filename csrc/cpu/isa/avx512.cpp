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

constexpr int BYTES = 64;
constexpr int MR = 14, ACCUMULATORS = 28;  // 14 x 2: with two vectors of b and a broadcast, 31 of the 32 registers

#include "../simd.inl"

PYPERC_INLINE Vector<float> load_partial(const float* p, int n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
PYPERC_INLINE void store_partial(float* p, Vector<float> v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
PYPERC_INLINE Vector<double> load_partial(const double* p, int n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
PYPERC_INLINE void store_partial(double* p, Vector<double> v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}

// GCC makes a compare and a blend of the ternary in simd.inl; the instruction has the same meaning, NaN included.
PYPERC_INLINE Vector<float> min(Vector<float> a, Vector<float> b) { return _mm512_maskz_min_ps(0xffff, a, b); }
PYPERC_INLINE Vector<float> max(Vector<float> a, Vector<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
PYPERC_INLINE Vector<double> min(Vector<double> a, Vector<double> b) { return _mm512_maskz_min_pd(0xff, a, b); }
PYPERC_INLINE Vector<double> max(Vector<double> a, Vector<double> b) { return _mm512_maskz_max_pd(0xff, a, b); }

#include "../isa_kernels.inl"

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

extern const Isa isa;
const Isa isa = {"avx512", runs_here, make_kernels<float>(), make_kernels<double>(), probe};

}  // namespace pyperc::avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
