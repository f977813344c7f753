// Random bits by counter, for dropout: element (row, column) of a layer has the same ones whoever asks, in any order.
#pragma once

#include <cstdint>

#include "platform.h"

namespace pyperc {

// SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).
PYPERC_INLINE uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
// The key of one row, from which `random_bits` makes its columns' bits.
PYPERC_INLINE uint64_t row_key(uint64_t seed, uint64_t layer, uint64_t row) {
  return mixed(mixed(seed + 0x9e3779b97f4a7c15ull * (layer + 1)) + 0x9e3779b97f4a7c15ull * (row + 1));
}
// Wellons' lowbias32, twice, each time with half of the key: products of 32 bits, which every ISA has in vectors.
PYPERC_INLINE uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}
PYPERC_INLINE uint32_t random_bits(uint64_t key, uint32_t column) {
  return scrambled(scrambled(column + static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32));
}

}  // namespace pyperc
