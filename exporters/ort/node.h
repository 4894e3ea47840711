// What one SparseFFN node says: its attributes, checked when a session is made, and its tensors, checked in every call.
//
// Shapes: T tokens (all leading axes of x), D model width, F neurons, E experts, S neurons per expert, C columns of what
// the router reads: x, if it is given nothing else.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "activation.h"
#include "api.h"

namespace lte {

struct Settings {
  Activation activation;
  int64_t expert_size;  // S, at least 1
  bool gated;
  float threshold;  // any value but NaN
};

// Throws BadInput for an attribute that is missing, of another type or out of range.
Settings read_settings(const Api& api, const abi::OrtKernelInfo* info);

// In the order of the operator's inputs (exporters/schema.py).
enum Input : size_t {
  kX,
  kRouter,
  kRouterBias,
  kUp,
  kGate,
  kDown,
  kUpBias,
  kGateBias,
  kDownBias,
  kRouterX,
  kInputCount
};

// Every input but these may be left out.
constexpr bool is_required(size_t input) { return input == kX || input == kRouter || input == kUp || input == kDown; }

struct Tensors {
  std::vector<int64_t> x_dims;
  const void* data[kInputCount];  // null where an optional input is not given
  int64_t tokens;
  int64_t width;
  int64_t neurons;
  int64_t experts;
  int64_t router_width;  // C

  const void* router_x() const { return data[data[kRouterX] == nullptr ? kX : kRouterX]; }
};

// Reads the inputs and checks every shape against the others. Throws BadInput. What a kernel does with the result
// stays inside the tensors.
Tensors read_tensors(const Api& api, const abi::OrtKernelContext* context, const Settings& settings);

}  // namespace lte
