// What the SparseFFN operators of all providers and element types have in common.
#pragma once

#include "abi.h"

namespace lte {

// ONNX Runtime hands every member function the operator itself, and with it what they differ in.
struct Operator : abi::OrtCustomOp {
  const char* provider;
  abi::ONNXTensorElementDataType type;
};

// All but CreateKernelV2, KernelComputeV2 and KernelDestroy.
Operator make_operator(const char* provider, abi::ONNXTensorElementDataType type);

}  // namespace lte
