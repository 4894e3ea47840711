// Kernels as they are loaded into one context, and launching them.
#pragma once

#include <string>

#include "driver.h"
#include "images.h"

namespace lte::cuda {

struct Kernel {
  Function* function;
  const Image* image;
};

// Loads the image that fits the device of the current context, once for each context. Throws CudaError.
Kernel load_kernel(const std::string& name);

// At least `bytes` of zeros in the memory of the current context. Throws CudaError.
const void* zeros(size_t bytes);

namespace detail {

constexpr char letter(const void*) { return 'p'; }
constexpr char letter(int32_t) { return 'i'; }
constexpr char letter(float) { return 'f'; }

void check_parameters(const Image& image, const char* given);

}  // namespace detail

// Arguments are pointers, int32_t and float, in the kernel's order. Triton adds two pointers, to memory that these
// kernels do not use.
template <typename... Arguments>
void launch(const Kernel& kernel, Grid grid, Stream* stream, Arguments... arguments) {
  static constexpr char kGiven[] = {detail::letter(Arguments{})..., 'p', 'p', '\0'};
  detail::check_parameters(*kernel.image, kGiven);
  void *scratch = nullptr, *profile = nullptr;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., &scratch, &profile};
  const Image& image = *kernel.image;
  Driver::get().launch(kernel.function, {grid, image.threads, image.shared, image.is_dependent}, stream, addresses);
}

}  // namespace lte::cuda
