// The loops of simd.h for processors with AVX512.
#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "simd.h"

#define LTE_SET avx512
#define LTE_SET_NAME "avx512"
#define LTE_VECTOR_BYTES 64
#include "loops.inc"

#endif
