// The twins of the device's primitives: what ../primitives.cuh says, on the emulator, with checks of every address.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator.h"

namespace pyperc::cuda {

PYPERC_DEVICE int thread() { return emulate::self().thread; }
PYPERC_DEVICE int threads() { return emulate::self().threads; }
PYPERC_DEVICE int64_t block() { return emulate::self().block; }
PYPERC_DEVICE int64_t blocks() { return emulate::self().blocks; }

PYPERC_DEVICE std::byte* shared_memory() { return emulate::shared(); }

PYPERC_DEVICE void sync() { emulate::barrier(0, threads()); }
PYPERC_DEVICE void sync(int id, int count) { emulate::barrier(id, count); }

namespace emulate {

inline void check_aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes)) {
    fail(std::string(what) + ": an address that is no multiple of " + std::to_string(bytes));
  }
}
inline void check_shared(const void* p, int bytes, const char* what) {
  check_aligned(p, bytes, what);
  const std::ptrdiff_t offset = static_cast<const std::byte*>(p) - shared();
  if (offset < 0 || offset + bytes > static_cast<std::ptrdiff_t>(shared_size())) {
    fail(std::string(what) + ": byte " + std::to_string(offset) + " of " + std::to_string(shared_size()) +
         " bytes of shared memory");
  }
}

template <class T>
struct Shuffle {
  T value;
  int from;
};
template <class T>
void shuffle(void* const* arguments) {
  T values[WARP];
  for (int i = 0; i < WARP; ++i) values[i] = static_cast<Shuffle<T>*>(arguments[i])->value;
  for (int i = 0; i < WARP; ++i) {
    auto* a = static_cast<Shuffle<T>*>(arguments[i]);
    if (a->from < 0 || a->from >= WARP) fail("a shuffle from lane " + std::to_string(a->from));
    a->value = values[a->from];
  }
}

template <int N>
struct Load {
  uint32_t (&r)[N];
  const void* row;
};
template <int N, bool TRANSPOSED>
void ldmatrix(void* const* arguments) {
  const auto at = [&](int lane) { return static_cast<Load<N>*>(arguments[lane]); };
  for (int i = 0; i < N; ++i) {
    uint16_t matrix[8][8];
    unsigned banks = 0;  // of 16 bytes
    for (int row = 0; row < 8; ++row) {
      const void* p = at(8 * i + row)->row;
      check_shared(p, 16, "ldmatrix");
      std::memcpy(matrix[row], p, 16);
      const unsigned bank = 1u << (static_cast<const std::byte*>(p) - shared()) / 16 % 8;
      counts().conflicts += (banks & bank) != 0;
      banks |= bank;
    }
    ++counts().ldmatrix;
    for (int lane = 0; lane < WARP; ++lane) {
      const int g = lane / 4, q = lane % 4;
      const uint16_t low = TRANSPOSED ? matrix[2 * q][g] : matrix[g][2 * q];
      const uint16_t high = TRANSPOSED ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
      at(lane)->r[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace emulate

inline void warp_sync() {
  emulate::together([](void* const*) {}, "warp_sync", nullptr);
}
template <class T>
T warp_from(T value, int from) {
  emulate::Shuffle<T> argument{value, from};
  emulate::together(emulate::shuffle<T>, "warp_from", &argument);
  return argument.value;
}
template <class T>
T warp_xor(T value, int mask) {
  return warp_from(value, (thread() % WARP) ^ mask);
}

template <class T>
PYPERC_DEVICE Vector<T> load16(const T* p) {
  emulate::check_aligned(p, 16, "load16");
  Vector<T> v;
  std::memcpy(&v, p, 16);
  return v;
}
template <class T>
PYPERC_DEVICE void store16(T* p, const Vector<T>& v) {
  emulate::check_aligned(p, 16, "store16");
  std::memcpy(p, &v, 16);
}

template <int BYTES>
void copy_async(void* to, const void* from, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  emulate::check_shared(to, BYTES, "copy_async");
  emulate::check_aligned(from, BYTES, "copy_async");
  if (valid < 0 || valid > BYTES) emulate::fail("copy_async of " + std::to_string(valid) + " bytes");
  emulate::copy(to, from, BYTES, valid);
}
inline void copy_commit() { emulate::commit(); }
template <int N>
void copy_wait() {
  emulate::wait(N);
}

inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  emulate::Load<4> argument{r, row};
  emulate::together(emulate::ldmatrix<4, false>, "ldmatrix", &argument);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  emulate::Load<4> argument{r, row};
  emulate::together(emulate::ldmatrix<4, true>, "ldmatrix_transposed", &argument);
}
inline void ldmatrix(uint32_t (&r)[2], const void* row) {
  emulate::Load<2> argument{r, row};
  emulate::together(emulate::ldmatrix<2, false>, "ldmatrix", &argument);
}
inline void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
  emulate::Load<2> argument{r, row};
  emulate::together(emulate::ldmatrix<2, true>, "ldmatrix_transposed", &argument);
}

namespace emulate {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t to_bfloat16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}
inline uint16_t to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  const float a = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (a >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
  // Adding a power of two rounds to the spacing of float16 in that binade.
  int exponent;
  std::frexp(a, &exponent);
  const float spacing = std::ldexp(1.0f, std::max(exponent, -13) - 11), steps = std::nearbyint(a / spacing);
  const float rounded = steps * spacing;
  if (rounded < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 0x1p24f));
  const uint32_t bits = bits_of(rounded);
  return static_cast<uint16_t>(sign | ((bits >> 23) - 112) << 10 | (bits >> 13 & 1023));
}

// What a matrix instruction reads of an operand register: its terms, and how each is widened.
template <class T>
struct Terms;
template <>
struct Terms<BFloat16> {
  static constexpr int COUNT = 2;
  static float of(uint32_t r, int i) { return float_of(r >> 16 * i << 16); }
};
template <>
struct Terms<Half> {
  static constexpr int COUNT = 2;
  static float of(uint32_t r, int i) { return from_half(static_cast<uint16_t>(r >> 16 * i)); }
};
template <>
struct Terms<float> {
  static constexpr int COUNT = 1;
  static float of(uint32_t r, int) { return float_of(r & ~0x1fffu); }
};

template <class T>
struct Product {
  FragmentC& c;
  const FragmentA& a;
  const FragmentB& b;
};
template <class T>
void mma(void* const* arguments) {
  constexpr int COUNT = Terms<T>::COUNT, K = 8 * COUNT, HALF = K / 2;
  float a[16][K], b[K][8];
  const auto at = [&](int lane) { return static_cast<Product<T>*>(arguments[lane]); };
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int i = 0; i < COUNT; ++i) {
      const int k = COUNT * q + i;
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][k + r / 2 * HALF] = Terms<T>::of(at(lane)->a.r[r], i);
      for (int r = 0; r < 2; ++r) b[k + r * HALF][g] = Terms<T>::of(at(lane)->b.r[r], i);
    }
  }
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = g + r / 2 * 8, column = 2 * q + r % 2;
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      at(lane)->c.r[r] = static_cast<float>(at(lane)->c.r[r] + sum);
    }
  }
  ++counts().mma;
}

struct Product64 {
  FragmentC64& c;
  double a, b;
};
inline void mma64(void* const* arguments) {
  const auto at = [&](int lane) { return static_cast<Product64*>(arguments[lane]); };
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 2; ++r) {
      for (int k = 0; k < 4; ++k) at(lane)->c.r[r] += at(4 * g + k)->a * at(4 * (2 * q + r) + k)->b;
    }
  }
  ++counts().mma;
}

}  // namespace emulate

template <class T>
void mma(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  emulate::Product<T> argument{c, a, b};
  emulate::together(emulate::mma<T>, "mma", &argument);
}
inline void mma(FragmentC64& c, double a, double b) {
  emulate::Product64 argument{c, a, b};
  emulate::together(emulate::mma64, "mma", &argument);
}

inline uint32_t tf32(float x) {  // to nearest, ties away from zero
  const uint32_t bits = emulate::bits_of(x);
  return std::isfinite(x) ? (bits + 0x1000) & ~0x1fffu : bits;
}

PYPERC_DEVICE float divide(float a, float b) { return a / b; }
PYPERC_DEVICE double divide(double a, double b) { return a / b; }

inline float widen(BFloat16 x) { return emulate::float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) { return emulate::from_half(x.bits); }
inline float power_of_two(float x) { return x < -126 ? 0.0f : std::exp2(x); }

template <class S>
uint32_t narrow_pair(float first, float second) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return emulate::to_bfloat16(first) | static_cast<uint32_t>(emulate::to_bfloat16(second)) << 16;
  } else {
    return emulate::to_half(first) | static_cast<uint32_t>(emulate::to_half(second)) << 16;
  }
}

template <class T>
void store_pair(T* p, float first, float second) {
  emulate::check_aligned(p, 2 * sizeof(T), "store_pair");
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = narrow_pair<T>(first, second);
    std::memcpy(p, &pair, sizeof pair);
  } else {
    p[0] = first;
    p[1] = second;
  }
}
template <class T>
void load_pair(const T* p, float& first, float& second) {
  emulate::check_aligned(p, 2 * sizeof(T), "load_pair");
  if constexpr (sizeof(T) == 2) {
    first = widen(p[0]);
    second = widen(p[1]);
  } else {
    first = p[0];
    second = p[1];
  }
}

}  // namespace pyperc::cuda
