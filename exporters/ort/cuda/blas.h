// cuBLAS, which multiplies the matrices of a prompt: the copy that ONNX Runtime's CUDA provider has in the process.
#pragma once

#include <cstdint>

#include "driver.h"

namespace lte::cuda {

// cudaDataType_t, of library_types.h.
enum class DataType : int { kFloat = 0, kHalf = 2, kBFloat16 = 14 };

// result [rows, columns] = left [rows, inner] right + scale * result, all row-major; right is [inner, columns] or,
// where is_right_transposed, [columns, inner].
struct Product {
  int64_t rows, columns, inner;
  const void* left;
  const void* right;
  bool is_right_transposed;
  void* result;
  DataType type;         // of left and right
  DataType result_type;  // sums are float32 in any case
  float scale;
};

// False where the process has no cuBLAS. Opens it if it must; creates a handle for the stream at its first use.
bool has_blas();
void multiply(Stream* stream, const Product& product);

}  // namespace lte::cuda
