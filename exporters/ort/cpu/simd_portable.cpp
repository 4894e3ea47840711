// The loops of simd.h for any processor.
#include <cstring>
#include <type_traits>
#include <utility>

#include "simd.h"

#define LTE_SET portable
#define LTE_SET_NAME "portable"
#define LTE_VECTOR_BYTES 16
#include "loops.inc"
