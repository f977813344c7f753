// What the AVX-512 files have in common: vectors of 64 bytes, their tile, and what the compiler does not find by
// itself. Included inside the anonymous namespace of each.

constexpr int BYTES = 64;
constexpr int MR = 14, ACCUMULATORS = 28;  // 14 x 2: with two vectors of b and a broadcast, 31 of the 32 registers
constexpr int A_BLOCK = 448 * 1024;
constexpr int UNROLL = 1;
constexpr bool FETCHES = true;

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

PYPERC_INLINE Vector<float> square_root(Vector<float> x) { return _mm512_maskz_sqrt_ps(0xffff, x); }
PYPERC_INLINE Vector<double> square_root(Vector<double> x) { return _mm512_maskz_sqrt_pd(0xff, x); }

PYPERC_INLINE Vector<float> load(const Half* p) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PYPERC_INLINE void store(Half* p, Vector<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
