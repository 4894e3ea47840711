#include "node.h"

namespace lte {

namespace {

constexpr const char* kInputNames[kInputCount] = {"x",      "w_router", "b_router", "w_up",   "w_gate",
                                                  "w_down", "b_up",     "b_gate",   "b_down", "x_router"};

struct Shapes {
  std::vector<int64_t> dims[kInputCount];
  bool is_given[kInputCount];
};

std::string text(const std::vector<int64_t>& dims) {
  std::string result = "[";
  for (size_t axis = 0; axis < dims.size(); ++axis) result += (axis ? ", " : "") + std::to_string(dims[axis]);
  return result + "]";
}

// 0 when any axis is 0, whatever the others are.
int64_t product(const std::vector<int64_t>& dims, size_t count) {
  int64_t result = 1;
  for (size_t axis = 0; axis < count; ++axis)
    if (dims[axis] == 0) return 0;
  for (size_t axis = 0; axis < count; ++axis)
    if (__builtin_mul_overflow(result, dims[axis], &result)) throw BadInput("x is " + text(dims) + ": too large");
  return result;
}

void check_rank(const Shapes& shapes, Input input, size_t rank, const char* wanted) {
  if (shapes.dims[input].size() != rank)
    throw BadInput(std::string(kInputNames[input]) + " is " + text(shapes.dims[input]) + "; it must be " + wanted);
}

void check_shape(const Shapes& shapes, Input input, const std::vector<int64_t>& wanted, const char* axes) {
  if (shapes.is_given[input] && shapes.dims[input] != wanted)
    throw BadInput(std::string(kInputNames[input]) + " is " + text(shapes.dims[input]) + "; it must be " + axes +
                   " = " + text(wanted));
}

void check_given(const Shapes& shapes, const Settings& settings) {
  for (size_t input = 0; input < kInputCount; ++input)
    if (is_required(input) && !shapes.is_given[input])
      throw BadInput(std::string(kInputNames[input]) + " is not given; it is required");
  if (settings.gated != shapes.is_given[kGate])
    throw BadInput(settings.gated ? "gated is 1, but w_gate is not given" : "gated is 0, but w_gate is given");
  if (!settings.gated && shapes.is_given[kGateBias]) throw BadInput("b_gate is given, but gated is 0");
}

void check_experts(int64_t experts, int64_t neurons, int64_t expert_size) {
  const int64_t wanted = neurons / expert_size + (neurons % expert_size != 0);
  if (experts != wanted)
    throw BadInput("w_router has " + std::to_string(experts) + " experts; " + std::to_string(neurons) +
                   " neurons in experts of " + std::to_string(expert_size) + " make " + std::to_string(wanted));
}

// Columns of what the router reads.
int64_t read_router_width(const Shapes& shapes) {
  const std::vector<int64_t>& x = shapes.dims[kX];
  if (!shapes.is_given[kRouterX]) return x.back();
  std::vector<int64_t> wanted = shapes.dims[kRouterX];
  if (wanted.empty() || wanted.back() == 0) throw BadInput("x_router is " + text(wanted) + "; it must have columns");
  const int64_t width = wanted.back();
  wanted = x;
  wanted.back() = width;
  check_shape(shapes, kRouterX, wanted, "[..., C], of the tokens of x,");
  return width;
}

Shapes read_shapes(const Api& api, const abi::OrtKernelContext* context, Tensors& tensors) {
  Shapes shapes{};
  const size_t count = api.input_count(context);  // trailing optional inputs may be missing altogether
  for (size_t input = 0; input < kInputCount; ++input) {
    const abi::OrtValue* value = input < count ? api.input(context, input) : nullptr;
    shapes.is_given[input] = value != nullptr;
    tensors.data[input] = value ? api.data(value) : nullptr;
    if (value) shapes.dims[input] = api.dims(value);
  }
  return shapes;
}

}  // namespace

Tensors read_tensors(const Api& api, const abi::OrtKernelContext* context, const Settings& settings) {
  Tensors tensors{};
  const Shapes shapes = read_shapes(api, context, tensors);
  check_given(shapes, settings);
  tensors.x_dims = shapes.dims[kX];
  if (tensors.x_dims.empty()) throw BadInput("x is a scalar; it must be [..., D]");
  check_rank(shapes, kRouter, 2, "[E, D]");
  check_rank(shapes, kUp, 2, "[F, D]");
  tensors.width = tensors.x_dims.back();
  tensors.tokens = product(tensors.x_dims, tensors.x_dims.size() - 1);
  tensors.experts = shapes.dims[kRouter][0];
  tensors.neurons = shapes.dims[kUp][0];
  tensors.router_width = read_router_width(shapes);
  const int64_t e = tensors.experts, f = tensors.neurons, d = tensors.width, c = tensors.router_width;
  check_shape(shapes, kRouter, {e, c}, shapes.is_given[kRouterX] ? "[E, C]" : "[E, D]");
  check_shape(shapes, kUp, {f, d}, "[F, D]");
  check_shape(shapes, kGate, {f, d}, "[F, D]");
  check_shape(shapes, kDown, {f, d}, "[F, D]");
  check_shape(shapes, kRouterBias, {e}, "[E]");
  check_shape(shapes, kUpBias, {f}, "[F]");
  check_shape(shapes, kGateBias, {f}, "[F]");
  check_shape(shapes, kDownBias, {d}, "[D]");
  check_experts(e, f, settings.expert_size);
  return tensors;
}

}  // namespace lte
