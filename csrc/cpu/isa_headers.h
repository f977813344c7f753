// The system headers of an ISA file, read before it raises the compiler's target. kernels.h comes after that: a
// template belongs to the target in force where it is defined.
#pragma once

#include <cstdint>
#include <ctime>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
