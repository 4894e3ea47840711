// The activations of kernels/activations.py.
#pragma once

namespace lte {

enum class Activation {
  kRelu,
  kGelu,
  kGeluTanh,
  kSilu,
  kQuickGelu,
  kReluSquared,
  kSigmoid,
  kTanh,
  kIdentity,
  kLeakyRelu,
  kElu,
  kMish,
};

}  // namespace lte
