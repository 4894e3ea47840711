#include "operator.h"

#include "node.h"

namespace lte {

namespace {

using abi::OrtCustomOp;

const char* provider(const OrtCustomOp* op) { return static_cast<const Operator*>(op)->provider; }

abi::ONNXTensorElementDataType type(const OrtCustomOp* op, size_t) { return static_cast<const Operator*>(op)->type; }

}  // namespace

Operator make_operator(const char* provider_name, abi::ONNXTensorElementDataType element_type) {
  Operator op{};
  op.provider = provider_name;
  op.type = element_type;
  op.version = abi::kVersion;
  op.GetName = [](const OrtCustomOp*) { return "SparseFFN"; };
  op.GetExecutionProviderType = provider;
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return kInputCount; };
  op.GetInputType = type;
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = type;
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t input) {
    return is_required(input) ? abi::INPUT_OUTPUT_REQUIRED : abi::INPUT_OUTPUT_OPTIONAL;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return abi::INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return abi::OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  return op;
}

}  // namespace lte
