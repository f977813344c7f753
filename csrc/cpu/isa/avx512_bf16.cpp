// The kernels for AVX-512 (F, DQ, BW, VL) with BF16: products of bfloat16 take pairs. All others are those of
// avx512.cpp.
#include "../isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx2,fma")
#endif

#include "../kernels.h"

namespace pyperc::avx512 {
extern const Kernels<float> f32;
extern const Kernels<double> f64;
extern const HalfKernels<Half> f16;
}  // namespace pyperc::avx512

namespace pyperc::avx512_bf16 {
namespace {

#include "avx512.inl"

template <class S>
constexpr bool HAS_PAIRS = false;
template <>
constexpr bool HAS_PAIRS<BFloat16> = true;

PYPERC_INLINE Vector<Pair> load_partial(const Pair* p, int n) {
  return (Vector<Pair>)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p);
}
PYPERC_INLINE void store_partial(Pair* p, Vector<Pair> v, int n) {
  _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), (__m512i)v);
}
PYPERC_INLINE Vector<Pair> broadcast(Pair x) { return (Vector<Pair>)_mm512_set1_epi32(static_cast<int>(x.bits)); }

// Stores x rounded, but for denormals, which the instruction would take for zero.
PYPERC_INLINE bool convert(BFloat16* p, Vector<float> x) {
  constexpr int DENORMAL = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(x, DENORMAL), 0)) return false;
  const __m256bh h = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(p, &h, sizeof(h));
  return true;
}

// c + a0 b0 + a1 b1 in each lane. The instruction takes denormals for zero, as it does in torch's larger products.
PYPERC_INLINE Vector<float> dot_pairs(Vector<Pair> a, Vector<Pair> b, Vector<float> c) {
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
}

#include "../isa_kernels.inl"

bool runs_here() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

extern const Isa isa;
const Isa isa = {"avx512_bf16", runs_here, avx512::f32, avx512::f64, HALF_KERNELS<BFloat16>, avx512::f16, probe};

}  // namespace pyperc::avx512_bf16

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
