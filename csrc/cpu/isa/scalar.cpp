// The kernels in plain C++, for any processor.
#include "../isa_headers.h"
#include "../kernels.h"

namespace pyperc::scalar {
namespace {

constexpr int BYTES = 0;
constexpr int MR = 4, ACCUMULATORS = 8;

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

#include "../isa_kernels.inl"

bool runs_here() { return true; }

}  // namespace

extern const Isa isa;
const Isa isa = {"scalar", runs_here, make_kernels<float>(), make_kernels<double>(), probe};

}  // namespace pyperc::scalar
