// The FFN on a GPU: what exporters/ort/cpu/ffn.h computes, by Triton kernels and, for a prompt, cuBLAS.
//
// Everything is put on one stream and nothing waits for it, so that a CUDA graph can capture a call. Shapes: T tokens,
// D model width, F neurons, E experts, S neurons per expert (fewer in the last), C columns of what the router reads.
#pragma once

#include <array>
#include <cstdint>

#include "../activation.h"
#include "blas.h"
#include "kernels.h"

namespace lte::cuda {

// All pointers are to memory of the device.
struct Ffn {
  DataType type;
  int32_t width;
  int32_t neurons;
  int32_t experts;
  int32_t router_width;  // C
  int32_t expert_size;
  Activation activation;
  float threshold;
  const void* w_router;  // [E, C]
  const void* b_router;  // [E], zeros where the model has none, as every bias
  const void* w_up;      // [F, D]
  const void* w_gate;    // [F, D], null when plain
  const void* w_down;    // [F, D]
  const void* b_up;      // [F]
  const void* b_gate;    // [F]
  const void* b_down;    // [D]
  bool adds_down_bias;   // whether b_down is the model's
};

// Larger sizes overflow what the kernels count in 32 bits.
inline constexpr int64_t kMaxSize = int64_t{1} << 24;

// The kernels for one element type, of gated or plain FFNs, in one context.
struct Kernels {
  struct One {
    Kernel up;
    Kernel small_down, large_down;  // by the number of experts
  };
  struct Few {
    Kernel scores, up;
    Kernel small_down, large_down;
  };
  struct Large {  // one token of a layer with long rows
    Kernel scores, up, down;
    int32_t programs;  // that run at once
  };
  One one_wide, one_any;
  Kernel one_paper_down;  // of experts of kPaperSize, at most kListSmall of them
  Large narrow, middle, broad;  // by the length of rows; none of float32
  Few few_small, few_large;  // by the number of tokens
  Kernel mask, fill;
};

// Throws CudaError.
Kernels load_kernels(DataType type, bool gated);

// Memory of the device until the end of a call.
class Scratch {
 public:
  virtual ~Scratch() = default;
  virtual void* take(size_t bytes) = 0;
};

struct Call {
  const Ffn& ffn;
  const Kernels& kernels;
  Stream* stream;
  Scratch& scratch;
};

size_t element_bytes(DataType type);

// What a call reads and writes: y [T, D] of x [T, D], and router_x [T, C], which may be x.
struct Values {
  const void* x;
  const void* router_x;
  void* y;
};

// From token `first` on.
Values from(const Ffn& ffn, const Values& values, int64_t first);

// No size is 0, except for the number of neurons.
void run(const Call& call, int64_t tokens, const Values& values);

// Its parts: one token, at most kListLarge experts and at least one; the same for large layers (fits_large); so many
// tokens as the type has kernels for, and sizes and pointers that are multiples of 16; any number, where the process
// has cuBLAS.
void run_one_token(const Call& call, const Values& values);
bool fits_large(const Ffn& ffn, const Values& values);
void run_large_layer(const Call& call, const Values& values);
void run_few_tokens(const Call& call, int32_t tokens, const Values& values);
void run_prompt(const Call& call, int64_t tokens, const Values& values);

// The down-projection's bias in every row of y.
void fill_rows(const Call& call, int32_t tokens, void* y);

// Whether kernels that read 16 bytes at a time fit: every pointer, and the widths, are multiples of 16.
bool is_wide(const Ffn& ffn, const Values& values);

inline int32_t parts(int32_t total, int32_t part) { return (total + part - 1) / part; }

// Several arrays in one allocation, each aligned as device memory is.
template <size_t count>
std::array<void*, count> take_all(Scratch& scratch, const int64_t (&bytes)[count]) {
  constexpr int64_t kAlignment = 256;
  std::array<void*, count> arrays{};
  int64_t starts[count], end = 0;
  for (size_t i = 0; i < count; ++i) {
    starts[i] = end;
    end += (bytes[i] + kAlignment - 1) / kAlignment * kAlignment;
  }
  void* all = scratch.take(static_cast<size_t>(end));
  for (size_t i = 0; i < count; ++i) arrays[i] = static_cast<char*>(all) + starts[i];
  return arrays;
}

// So many bytes into an array.
inline void* offset(void* pointer, int64_t bytes) { return static_cast<char*>(pointer) + bytes; }
inline const void* offset(const void* pointer, int64_t bytes) { return static_cast<const char*>(pointer) + bytes; }

}  // namespace lte::cuda
