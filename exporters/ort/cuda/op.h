// SparseFFN on ONNX Runtime's CUDA provider.
#pragma once

#include <vector>

#include "../abi.h"

namespace lte::cuda {

// One operator for each element type; they live as long as the library.
std::vector<const abi::OrtCustomOp*> operators();

}  // namespace lte::cuda
