// The 16-bit formats, which are stored but not computed in: sums and activations are float32.
#pragma once

#include <cstdint>

namespace pyperc {

struct BFloat16 {  // 1 sign, 8 exponent, 7 mantissa: the upper half of a float32
  uint16_t bits;
};
struct Half {  // 1 sign, 5 exponent, 10 mantissa: IEEE binary16
  uint16_t bits;
};

// What numbers of a format are computed in, one by one.
template <class S>
struct WideOf {
  using Type = S;
};
template <>
struct WideOf<BFloat16> {
  using Type = float;
};
template <>
struct WideOf<Half> {
  using Type = float;
};
template <class S>
using Wide = typename WideOf<S>::Type;

// Two neighbouring bfloat16, the first in the lower half: one operand of a product that sums two terms at once. Read in
// place from rows of BFloat16, so it is aligned as they are and may alias them.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

// What products of operands E are summed in, and how many terms one operand holds.
template <class E>
struct Operands {
  using Sum = E;
  static constexpr int64_t TERMS = 1;
};
template <>
struct Operands<Pair> {
  using Sum = float;
  static constexpr int64_t TERMS = 2;
};
template <class E>
using Sum = typename Operands<E>::Sum;

}  // namespace pyperc
