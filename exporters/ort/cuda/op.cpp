#include "op.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "../node.h"
#include "../operator.h"
#include "ffn.h"

namespace lte::cuda {

namespace {

using abi::OrtCustomOp;

DataType type_of(const OrtCustomOp* op) {
  const auto type = static_cast<const Operator*>(op)->type;
  if (type == abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return DataType::kFloat;
  return type == abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? DataType::kHalf : DataType::kBFloat16;
}

// What a session keeps of one node.
class Node {
 public:
  Node(const Api& api, const abi::OrtKernelInfo* info, DataType type)
      : api_(api), settings_(read_settings(api, info)), type_(type), allocator_(api.allocator(info)) {}
  ~Node() { api_.release_allocator(allocator_); }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  // In the context of the calling thread; loads them at its first call there.
  const Kernels& kernels() {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& kernels = kernels_[Driver::get().current_context()];
    if (kernels == nullptr) {
      kernels = std::make_unique<Kernels>(load_kernels(type_, settings_.gated));
      zeros(0);
    }
    return *kernels;
  }

  void compute(abi::OrtKernelContext* context);

 private:
  Ffn make_ffn(const Tensors& tensors) const;

  Api api_;
  Settings settings_;
  DataType type_;
  abi::OrtAllocator* allocator_;
  std::mutex mutex_;
  std::map<Context*, std::unique_ptr<Kernels>> kernels_;
};

// From ONNX Runtime's allocator. Given back when the call is on the stream: what comes next there may have it.
class OrtScratch : public Scratch {
 public:
  OrtScratch(const Api& api, const abi::OrtKernelContext* context, abi::OrtAllocator* allocator)
      : api_(api), context_(context), allocator_(allocator) {}
  ~OrtScratch() override {
    for (void* memory : taken_) api_.free(allocator_, memory);
  }
  OrtScratch(const OrtScratch&) = delete;
  OrtScratch& operator=(const OrtScratch&) = delete;

  void* take(size_t bytes) override {
    if (bytes == 0) return nullptr;
    taken_.reserve(taken_.size() + 1);
    taken_.push_back(api_.allocate(context_, allocator_, bytes));
    return taken_.back();
  }

 private:
  const Api& api_;
  const abi::OrtKernelContext* context_;
  abi::OrtAllocator* allocator_;
  std::vector<void*> taken_;
};

int32_t size(int64_t value, const char* name) {
  if (value > kMaxSize)
    throw BadInput(std::string(name) + " is " + std::to_string(value) + "; CUDA kernels take at most " +
                   std::to_string(kMaxSize));
  return static_cast<int32_t>(value);
}

Ffn Node::make_ffn(const Tensors& tensors) const {
  Ffn ffn{};
  ffn.type = type_;
  ffn.width = size(tensors.width, "D");
  ffn.neurons = size(tensors.neurons, "F");
  ffn.experts = size(tensors.experts, "E");
  ffn.router_width = size(tensors.router_width, "C");
  // One expert may say that it has room for more neurons than there are.
  ffn.expert_size = static_cast<int32_t>(std::min<int64_t>(settings_.expert_size, std::max(1, ffn.neurons)));
  ffn.activation = settings_.activation;
  ffn.threshold = settings_.threshold;
  const void* none = zeros(4 * static_cast<size_t>(std::max({ffn.width, ffn.neurons, ffn.experts})));
  const auto bias = [&](Input input) { return tensors.data[input] == nullptr ? none : tensors.data[input]; };
  ffn.w_router = tensors.data[kRouter];
  ffn.b_router = bias(kRouterBias);
  ffn.w_up = tensors.data[kUp];
  ffn.w_gate = tensors.data[kGate];
  ffn.w_down = tensors.data[kDown];
  ffn.b_up = bias(kUpBias);
  ffn.b_gate = bias(kGateBias);
  ffn.b_down = bias(kDownBias);
  ffn.adds_down_bias = tensors.data[kDownBias] != nullptr;
  return ffn;
}

void Node::compute(abi::OrtKernelContext* context) {
  const Tensors tensors = read_tensors(api_, context, settings_);
  void* y = api_.data(api_.output(context, 0, tensors.x_dims));
  if (tensors.tokens == 0 || tensors.width == 0) return;
  auto* stream = static_cast<Stream*>(api_.stream(context));
  Driver::get().enter(stream);
  const Kernels& loaded = kernels();
  const Ffn ffn = make_ffn(tensors);
  OrtScratch scratch(api_, context, allocator_);
  run({ffn, loaded, stream, scratch}, tensors.tokens, {tensors.data[kX], tensors.router_x(), y});
}

// A node, and how messages about it begin.
struct Named {
  Api api;
  std::string where;
  Node node;
};

abi::OrtStatus* create_kernel(const OrtCustomOp* op, const abi::OrtApi* table, const abi::OrtKernelInfo* info,
                              void** kernel) {
  const Api api(table);
  std::string where = "SparseFFN: ";
  return guarded(api, where, [&] {
    where = "SparseFFN node '" + api.node_name(info) + "': ";
    auto named = std::unique_ptr<Named>(new Named{api, where, {api, info, type_of(op)}});
    // Now rather than in a call that a CUDA graph captures, where the thread has the session's context already.
    if (Driver::get().current_context() != nullptr) named->node.kernels();
    *kernel = named.release();
  });
}

abi::OrtStatus* run_kernel(void* opaque, abi::OrtKernelContext* context) {
  auto& named = *static_cast<Named*>(opaque);
  return guarded(named.api, named.where, [&] { named.node.compute(context); });
}

Operator make(abi::ONNXTensorElementDataType type) {
  Operator op = make_operator("CUDAExecutionProvider", type);
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = run_kernel;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Named*>(kernel); };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> operators() {
  static const Operator ops[] = {make(abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT),
                                 make(abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16),
                                 make(abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)};
  return {&ops[0], &ops[1], &ops[2]};
}

}  // namespace lte::cuda
