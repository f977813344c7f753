// The kernels for AVX2 with FMA and F16C.
#include "../isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../kernels.h"

namespace pyperc::avx2 {
namespace {

constexpr int BYTES = 32;
constexpr int MR = 6, ACCUMULATORS = 12;  // 6 x 2: with two vectors of b and a broadcast, 15 of the 16 registers
// Beside 12 multiply-adds a step's other operations weigh: with 11 of them instead of 14 a Zen 3 runs 9 to 17% faster
// while another thread shares its cores, and as fast while it has them to itself.
constexpr int A_BLOCK = 224 * 1024;
constexpr int UNROLL = 4;
constexpr bool FETCHES = false;

#include "../simd.inl"

template <class B>
PYPERC_INLINE __m256i first(int n) {
  // Lanes 0 ... n - 1 all ones.
  if constexpr (sizeof(B) == 4) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}
PYPERC_INLINE Vector<float> load_partial(const float* p, int n) { return _mm256_maskload_ps(p, first<float>(n)); }
// In pieces: a masked store of AVX takes Zen 3 twenty cycles and more.
PYPERC_INLINE void store_partial(float* p, Vector<float> v, int n) {
  __m128 part = _mm256_castps256_ps128(v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
}
PYPERC_INLINE Vector<double> load_partial(const double* p, int n) { return _mm256_maskload_pd(p, first<double>(n)); }
PYPERC_INLINE void store_partial(double* p, Vector<double> v, int n) {
  __m128d part = _mm256_castpd256_pd128(v);
  if (n & 2) {
    _mm_storeu_pd(p, part);
    part = _mm256_extractf128_pd(v, 1);
    p += 2;
  }
  if (n & 1) _mm_store_sd(p, part);
}

// GCC makes a compare and a blend of the ternary in simd.inl; the instruction has the same meaning, NaN included.
PYPERC_INLINE Vector<float> min(Vector<float> a, Vector<float> b) { return _mm256_min_ps(a, b); }
PYPERC_INLINE Vector<float> max(Vector<float> a, Vector<float> b) { return _mm256_max_ps(a, b); }
PYPERC_INLINE Vector<double> min(Vector<double> a, Vector<double> b) { return _mm256_min_pd(a, b); }
PYPERC_INLINE Vector<double> max(Vector<double> a, Vector<double> b) { return _mm256_max_pd(a, b); }

PYPERC_INLINE Vector<float> square_root(Vector<float> x) { return _mm256_sqrt_ps(x); }
PYPERC_INLINE Vector<double> square_root(Vector<double> x) { return _mm256_sqrt_pd(x); }

PYPERC_INLINE Vector<float> load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PYPERC_INLINE void store(Half* p, Vector<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

template <class S>
constexpr bool HAS_PAIRS = false;

#include "../isa_kernels.inl"

// clang 14 has no name for F16C.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

}  // namespace

extern const Isa isa;
const Isa isa = {"avx2", runs_here, KERNELS<float>, KERNELS<double>, HALF_KERNELS<BFloat16>, HALF_KERNELS<Half>, probe};

}  // namespace pyperc::avx2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
