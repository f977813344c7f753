// The kernels in plain C++, for any processor.
#include "../isa_headers.h"
#include "../kernels.h"

namespace pyperc::scalar {
namespace {

constexpr int BYTES = 0;
constexpr int MR = 4, ACCUMULATORS = 8;
constexpr int A_BLOCK = 224 * 1024;
constexpr int UNROLL = 1;
constexpr bool FETCHES = true;

#include "../simd.inl"

// A vector of one element has no tail.
template <class T>
PYPERC_INLINE T load_partial(const T* p, int) {
  return *p;
}
template <class T>
PYPERC_INLINE void store_partial(T* p, T v, int) {
  *p = v;
}

PYPERC_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
PYPERC_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Changing the exponent's bias is a multiplication by a power of two, which gives denormals their value too.
PYPERC_INLINE float load(const Half* p) {
  const int32_t magnitude = (p->bits & 0x7fff) << 13, sign = static_cast<int32_t>((p->bits & 0x8000u) << 16);
  const bool special = magnitude >= 0x1f << 23;  // infinity or NaN
  const int32_t wide = special ? magnitude | 0xff << 23 : bits<float>(from_bits<float>(magnitude) * 0x1p112f);
  return from_bits<float>(wide | sign);
}
// To nearest, ties to even: of a normal number in integers, of a denormal by adding a number whose last place is its.
PYPERC_INLINE void store(Half* p, float x) {
  const auto b = static_cast<uint32_t>(bits<float>(x));
  const uint32_t magnitude = b & 0x7fffffffu;
  uint32_t y;
  if (magnitude >= 143u << 23) {
    y = magnitude > 0xffu << 23 ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 113u << 23) {
    y = static_cast<uint32_t>(bits<float>(from_bits<float>(static_cast<int32_t>(magnitude)) + 0.5f)) - (126u << 23);
  } else {
    y = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(y | b >> 31 << 15);
}

template <class S>
constexpr bool HAS_PAIRS = false;

#include "../isa_kernels.inl"

bool runs_here() { return true; }

}  // namespace

extern const Isa isa;
const Isa isa = {"scalar",           runs_here, KERNELS<float>, KERNELS<double>, HALF_KERNELS<BFloat16>,
                 HALF_KERNELS<Half>, probe};

}  // namespace pyperc::scalar
