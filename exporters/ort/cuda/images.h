// The Triton kernels in this library: machine code for some architectures, PTX for the others
// (exporters/ort_images.py).
#pragma once

#include <cstddef>

namespace lte::cuda {

struct Image {
  const char* name;
  int architecture;  // as Driver::capability has it; 0 is PTX, which the driver compiles
  const char* symbol;
  const char* parameters;  // a letter each: p pointer, i int32, f float
  unsigned threads;
  unsigned shared;
  bool is_dependent;  // started before the launch before it has ended, for which it waits
  size_t offset;
  size_t size;
};

// In the order of their names; of one name, from the newest architecture to PTX.
struct Images {
  const Image* begin;
  const Image* end;
};
Images images();
const void* code(const Image& image);

// Sizes that the kernels are compiled with.
#include "tiles.inc"

}  // namespace lte::cuda
