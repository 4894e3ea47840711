// SparseFFN on ONNX Runtime's CPU provider.
#pragma once

#include <vector>

#include "../abi.h"

namespace lte::cpu {

// One operator for each element type; they live as long as the library.
std::vector<const abi::OrtCustomOp*> operators();

}  // namespace lte::cpu
