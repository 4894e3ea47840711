// The types that activations and weights come in.
#pragma once

#include <cstdint>
#include <cstring>

namespace lte {

struct Half {  // IEEE 754 binary16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of a float
  uint16_t bits;
};

}  // namespace lte
