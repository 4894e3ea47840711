#include <cmath>
#include <utility>

#include "node.h"

namespace lte {

namespace {

constexpr std::pair<const char*, Activation> kActivations[] = {
    {"relu", Activation::kRelu},
    {"gelu", Activation::kGelu},
    {"gelu_tanh", Activation::kGeluTanh},
    {"silu", Activation::kSilu},
    {"quick_gelu", Activation::kQuickGelu},
    {"relu_squared", Activation::kReluSquared},
    {"sigmoid", Activation::kSigmoid},
    {"tanh", Activation::kTanh},
    {"identity", Activation::kIdentity},
    {"leaky_relu", Activation::kLeakyRelu},
    {"elu", Activation::kElu},
    {"mish", Activation::kMish},
};

Activation find_activation(const std::string& name) {
  std::string known;
  for (const auto& [text, activation] : kActivations) {
    if (name == text) return activation;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw BadInput("activation is '" + name + "'; known are " + known);
}

}  // namespace

Settings read_settings(const Api& api, const abi::OrtKernelInfo* info) {
  const std::string activation = api.string_attribute(info, "activation");
  const int64_t expert_size = api.int_attribute(info, "expert_size");
  const int64_t gated = api.int_attribute(info, "gated");
  const float threshold = api.float_attribute(info, "threshold");
  if (expert_size < 1) throw BadInput("expert_size is " + std::to_string(expert_size) + "; it must be at least 1");
  if (gated != 0 && gated != 1) throw BadInput("gated is " + std::to_string(gated) + "; it must be 0 or 1");
  if (std::isnan(threshold)) throw BadInput("threshold is NaN; it must be a number");
  return {find_activation(activation), expert_size, gated == 1, threshold};
}

}  // namespace lte
