#include "op.h"

#include <string>
#include <utility>

#include "../node.h"
#include "../operator.h"
#include "ffn.h"

namespace lte::cpu {

namespace {

using abi::OrtCustomOp;

template <typename Element>
struct Type;
template <>
struct Type<float> {
  static constexpr auto kOnnx = abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
};
template <>
struct Type<Half> {
  static constexpr auto kOnnx = abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
};
template <>
struct Type<BFloat16> {
  static constexpr auto kOnnx = abi::ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
};

// What a session keeps of one node. Calls may overlap, so they change nothing in it.
class Kernel {
 public:
  Kernel(const Api& given, std::string begin, const abi::OrtKernelInfo* info)
      : api(given), where(std::move(begin)), settings(read_settings(api, info)), simd(select_simd()),
        allocator(api.allocator(info)) {}
  ~Kernel() { api.release_allocator(allocator); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const Api api;
  const std::string where;  // how messages about the node begin
  const Settings settings;
  const Simd& simd;
  abi::OrtAllocator* const allocator;
};

// Of the session's arena, which keeps what a call gives back for the next one.
class OrtMemory : public Memory {
 public:
  OrtMemory(const Kernel& kernel, const abi::OrtKernelContext* context) : kernel_(kernel), context_(context) {}
  void* take(size_t bytes) const override { return kernel_.api.allocate(context_, kernel_.allocator, bytes); }
  void give_back(void* memory) const override { kernel_.api.free(kernel_.allocator, memory); }

 private:
  const Kernel& kernel_;
  const abi::OrtKernelContext* context_;
};

template <typename Element>
Ffn<Element> make_ffn(const Settings& settings, const Tensors& tensors) {
  const auto data = [&](Input input) { return static_cast<const Element*>(tensors.data[input]); };
  Ffn<Element> ffn{};
  ffn.width = tensors.width;
  ffn.neurons = tensors.neurons;
  ffn.experts = tensors.experts;
  ffn.router_width = tensors.router_width;
  ffn.expert_size = settings.expert_size;
  ffn.activation = settings.activation;
  ffn.threshold = settings.threshold;
  ffn.w_router = data(kRouter);
  ffn.b_router = data(kRouterBias);
  ffn.w_up = data(kUp);
  ffn.w_gate = data(kGate);
  ffn.w_down = data(kDown);
  ffn.b_up = data(kUpBias);
  ffn.b_gate = data(kGateBias);
  ffn.b_down = data(kDownBias);
  return ffn;
}

template <typename Element>
void compute(const Kernel& kernel, abi::OrtKernelContext* context) {
  const Tensors tensors = read_tensors(kernel.api, context, kernel.settings);
  auto* y = static_cast<Element*>(kernel.api.data(kernel.api.output(context, 0, tensors.x_dims)));
  if (tensors.width == 0) return;  // however many tokens have nothing
  const Parallel parallel(kernel.api, context);
  const auto* x = static_cast<const Element*>(tensors.data[kX]);
  const auto* router_x = static_cast<const Element*>(tensors.router_x());
  const OrtMemory memory(kernel, context);
  const Machine machine{kernel.simd, parallel, memory};
  run(make_ffn<Element>(kernel.settings, tensors), machine, tensors.tokens, x, router_x, y);
}

abi::OrtStatus* create_kernel(const OrtCustomOp*, const abi::OrtApi* table, const abi::OrtKernelInfo* info,
                              void** kernel) {
  const Api api(table);
  std::string where = "SparseFFN: ";
  return guarded(api, where, [&] {
    where = "SparseFFN node '" + api.node_name(info) + "': ";
    *kernel = new Kernel(api, where, info);
  });
}

template <typename Element>
abi::OrtStatus* run_kernel(void* opaque, abi::OrtKernelContext* context) {
  const auto& kernel = *static_cast<const Kernel*>(opaque);
  return guarded(kernel.api, kernel.where, [&] { compute<Element>(kernel, context); });
}

template <typename Element>
Operator make() {
  Operator op = make_operator("CPUExecutionProvider", Type<Element>::kOnnx);
  op.CreateKernelV2 = create_kernel;
  op.KernelComputeV2 = run_kernel<Element>;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> operators() {
  static const Operator ops[] = {make<float>(), make<Half>(), make<BFloat16>()};
  return {&ops[0], &ops[1], &ops[2]};
}

}  // namespace lte::cpu
