// What the kernels are written over: who a thread is, shared memory, barriers, shuffles, 16-byte accesses, asynchronous
// copies and the matrix instructions. Each is an instruction or two on a device, and has a twin in emulate/primitives.h
// that runs on the processor, so that a kernel's own text is tested without a GPU. Beyond these a kernel uses plain
// C++.
//
// A block has a multiple of 32 threads. What is named `warp_...`, ldmatrix and mma are executed by all 32 threads of a
// warp together. All shared memory is dynamic: what the launch asks for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../core/half.h"
#include "../core/platform.h"

#if defined(__CUDACC__)
#define PYPERC_DEVICE __device__ __forceinline__
// A kernel of at most THREADS threads a block, of which at least BLOCKS fit on one multiprocessor.
#define PYPERC_KERNEL(THREADS, BLOCKS) __global__ void __launch_bounds__(THREADS, BLOCKS)
// A kernel's parameter that is read where it lies, in constant memory.
#define PYPERC_PARAMETER const __grid_constant__
#else
#define PYPERC_DEVICE __attribute__((always_inline)) inline
#define PYPERC_KERNEL(THREADS, BLOCKS) void
#define PYPERC_PARAMETER const
#endif

namespace pyperc::cuda {

constexpr int WARP = 32;

PYPERC_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A fragment is a thread's share of the operands of one matrix instruction. With g = lane / 4 and q = lane % 4, element
// [row, column] of A (16 x 16), B (16 x 8, k by n) and C (16 x 8) in 16 bits:
//   a[0]: [g, 2q] [g, 2q+1]    a[1]: [g+8, ..]    a[2]: [g, 2q+8] [g, 2q+9]    a[3]: [g+8, 2q+8] [g+8, 2q+9]
//   b[0]: [2q, g] [2q+1, g]    b[1]: [2q+8, g] [2q+9, g]
//   c[0]: [g, 2q]    c[1]: [g, 2q+1]    c[2]: [g+8, 2q]    c[3]: [g+8, 2q+1]
// TF32 (A 16 x 8, B 8 x 8):  a[0]: [g, q]  a[1]: [g+8, q]  a[2]: [g, q+4]  a[3]: [g+8, q+4];  b[0]: [q, g]  b[1]: [q+4,
// g] float64 (A 8 x 4, B 4 x 8, C 8 x 8):  a: [g, q];  b: [q, g];  c[0]: [g, 2q]  c[1]: [g, 2q+1]
struct FragmentA {
  uint32_t r[4];
};
struct FragmentB {
  uint32_t r[2];
};
struct FragmentC {
  float r[4];
};
struct FragmentC64 {
  double r[2];
};

// What a dtype is computed and summed in.
template <class T>
using Wide = std::conditional_t<sizeof(T) == 2, float, T>;

// 16 bytes in registers, as elements of T.
template <class T>
struct alignas(16) Vector {
  static constexpr int SIZE = 16 / sizeof(T);
  T e[SIZE];
};

}  // namespace pyperc::cuda

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace pyperc::cuda {

PYPERC_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
PYPERC_DEVICE int threads() { return static_cast<int>(blockDim.x); }
PYPERC_DEVICE int64_t block() { return blockIdx.x; }
PYPERC_DEVICE int64_t blocks() { return gridDim.x; }

// The block's shared memory, aligned to 128 bytes.
PYPERC_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<std::byte*>(memory);
}
PYPERC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// All threads of the block; `id` from 1 to 15: the given number of threads, whole warps, that come to this barrier.
PYPERC_DEVICE void sync() { __syncthreads(); }
PYPERC_DEVICE void sync(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
PYPERC_DEVICE void warp_sync() { __syncwarp(); }

// The value of lane ^ mask, and of lane `from`.
template <class T>
PYPERC_DEVICE T warp_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
PYPERC_DEVICE T warp_from(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

// 16 bytes at an address that is a multiple of 16.
template <class T>
PYPERC_DEVICE Vector<T> load16(const T* p) {
  Vector<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(p);
  return v;
}
template <class T>
PYPERC_DEVICE void store16(T* p, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}

// Copies BYTES (4, 8 or 16, to which both addresses are aligned) from global to shared memory behind the thread's back:
// the first `valid` bytes are read, and zeros take the place of the others. What has been copied since the last
// copy_commit is a group; copy_wait<N> waits until all but the N latest groups of this thread are there. Other threads
// see the bytes after a barrier that follows the wait.
template <int BYTES>
PYPERC_DEVICE void copy_async(void* shared, const void* global, int valid = BYTES) {
  if constexpr (BYTES == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES),
                 "r"(valid)
                 : "memory");
  }
}
PYPERC_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
PYPERC_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Matrix i of four 8 x 8 matrices of 16-bit elements, whose rows of 16 bytes lie where lanes 8i to 8i + 7 point, into
// r[i]: lane gets elements 2q, 2q + 1 of row g; of column g with _transposed.
PYPERC_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
PYPERC_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// Two matrices; the addresses of lanes 16 to 31 are not read.
PYPERC_DEVICE void ldmatrix(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
PYPERC_DEVICE void ldmatrix_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// C += A B, by the type of the operands.
template <class T>
PYPERC_DEVICE void mma(FragmentC& c, const FragmentA& a, const FragmentB& b);

#define PYPERC_MMA(T, INSTRUCTION)                                                       \
  template <>                                                                            \
  PYPERC_DEVICE void mma<T>(FragmentC & c, const FragmentA& a, const FragmentB& b) {     \
    asm("mma.sync.aligned." INSTRUCTION                                                  \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                \
        "{%0, %1, %2, %3};"                                                              \
        : "+f"(c.r[0]), "+f"(c.r[1]), "+f"(c.r[2]), "+f"(c.r[3])                         \
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1])); \
  }
PYPERC_MMA(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
PYPERC_MMA(Half, "m16n8k16.row.col.f32.f16.f16.f32")
PYPERC_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")  // the operands as tf32() gives them
#undef PYPERC_MMA

PYPERC_DEVICE void mma(FragmentC64& c, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c.r[0]), "+d"(c.r[1])
      : "d"(a), "d"(b));
}

// A float32 rounded to TF32's 10 bits of mantissa.
PYPERC_DEVICE uint32_t tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// a / b, in float32 to two units in the last place, and 0 for b beyond 2^126.
PYPERC_DEVICE float divide(float a, float b) { return __fdividef(a, b); }
PYPERC_DEVICE double divide(double a, double b) { return a / b; }

// 2^x, to two units in the last place, and 0 below 2^-126.
PYPERC_DEVICE float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// The 16-bit formats in float32 and back, rounded to nearest, ties to even; of a pair, the first is the lower half.
PYPERC_DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PYPERC_DEVICE float widen(Half x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
template <class S>
PYPERC_DEVICE uint32_t narrow_pair(float first, float second);
template <>
PYPERC_DEVICE uint32_t narrow_pair<BFloat16>(float first, float second) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}
template <>
PYPERC_DEVICE uint32_t narrow_pair<Half>(float first, float second) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
  return r;
}

// Two elements at an address that is a multiple of their size, and back.
template <class T>
PYPERC_DEVICE void store_pair(T* p, float first, float second) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(p) = narrow_pair<T>(first, second);
  } else {
    *reinterpret_cast<float2*>(p) = make_float2(first, second);
  }
}
template <class T>
PYPERC_DEVICE void load_pair(const T* p, float& first, float& second) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(p);
    first = widen(T{static_cast<uint16_t>(pair)});
    second = widen(T{static_cast<uint16_t>(pair >> 16)});
  } else {
    const float2 pair = *reinterpret_cast<const float2*>(p);
    first = pair.x;
    second = pair.y;
  }
}

}  // namespace pyperc::cuda

#else
#include "emulate/primitives.h"
#endif

namespace pyperc::cuda {

PYPERC_DEVICE int lane() { return thread() % WARP; }
PYPERC_DEVICE int warp() { return thread() / WARP; }

// Every dtype in what is computed in, and back.
PYPERC_DEVICE float widen(float x) { return x; }
PYPERC_DEVICE double widen(double x) { return x; }
template <class T>
PYPERC_DEVICE T narrow(Wide<T> x) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(narrow_pair<T>(x, 0))};
  } else {
    return x;
  }
}

}  // namespace pyperc::cuda
