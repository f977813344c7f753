// Compiler and device attributes, the only place that asks which compiler this is.
#pragma once

#if defined(__CUDACC__)
#define PYPERC_HOST_DEVICE __host__ __device__
#else
#define PYPERC_HOST_DEVICE
#endif

// Kernel helpers must vanish into their caller: an out-of-line copy of an ISA's code would spill every register.
#define PYPERC_INLINE PYPERC_HOST_DEVICE __attribute__((always_inline)) inline

#define PYPERC_PRAGMA(text) _Pragma(#text)

#if defined(__CUDACC__)
#define PYPERC_UNROLL _Pragma("unroll")
#define PYPERC_NO_UNROLL _Pragma("unroll 1")  // where a second copy of the body would cost registers
#elif defined(__clang__)
#define PYPERC_UNROLL _Pragma("clang loop unroll(full)")
#define PYPERC_UNROLL_BY(n) PYPERC_PRAGMA(clang loop unroll_count(n))
#define PYPERC_NO_UNROLL
#else
#define PYPERC_UNROLL _Pragma("GCC unroll 64")
#define PYPERC_UNROLL_BY(n) PYPERC_PRAGMA(GCC unroll n)
#define PYPERC_NO_UNROLL
#endif
