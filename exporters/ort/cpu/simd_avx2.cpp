// The loops of simd.h for processors with AVX2.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "simd.h"

#define LTE_SET avx2
#define LTE_SET_NAME "avx2"
#define LTE_VECTOR_BYTES 32
#include "loops.inc"

#endif
