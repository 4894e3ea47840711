// Many tokens: so many select each expert that nothing can be skipped. cuBLAS multiplies, a kernel of ours masks.
#include <algorithm>

#include "ffn.h"

namespace lte::cuda {

namespace {

// Tokens multiplied at once: what lies between the products stays in some 100 MB for a model of 11,008 neurons.
constexpr int64_t kPromptTokens = 2048;

struct Memory {
  void* scores;  // [T, E], float32
  void* up;      // [T, F], the hidden value later
  void* gate;    // [T, F]
};

Memory take(const Call& call, int64_t tokens) {
  const Ffn& ffn = call.ffn;
  const int64_t hidden = static_cast<int64_t>(element_bytes(ffn.type)) * tokens * ffn.neurons;
  const auto [scores, up, gate] =
      take_all(call.scratch, {4 * tokens * ffn.experts, hidden, ffn.w_gate == nullptr ? 0 : hidden});
  return {scores, up, gate};
}

// x w^T of x [T, D], in the FFN's type
void project(const Call& call, int64_t tokens, const void* x, const void* w, void* result) {
  const Ffn& ffn = call.ffn;
  multiply(call.stream, {tokens, ffn.neurons, ffn.width, x, w, true, result, ffn.type, ffn.type, 0.0f});
}

void score(const Call& call, int64_t tokens, const void* router_x, void* scores) {
  const Ffn& ffn = call.ffn;
  multiply(call.stream, {tokens, ffn.experts, ffn.router_width, router_x, ffn.w_router, true, scores, ffn.type,
                         DataType::kFloat, 0.0f});
}

void mask(const Call& call, int32_t tokens, const Memory& memory) {
  const Ffn& ffn = call.ffn;
  const Grid grid{static_cast<unsigned>(tokens), static_cast<unsigned>(parts(ffn.neurons, kMaskNeurons))};
  const auto number = static_cast<int32_t>(ffn.activation);
  const Kernel& kernel = call.kernels.mask;
  if (ffn.w_gate == nullptr)
    return launch(kernel, grid, call.stream, memory.up, ffn.b_up, memory.scores, ffn.b_router, number, ffn.threshold,
                  ffn.neurons, ffn.experts, ffn.expert_size);
  launch(kernel, grid, call.stream, memory.up, memory.gate, ffn.b_up, ffn.b_gate, memory.scores, ffn.b_router, number,
         ffn.threshold, ffn.neurons, ffn.experts, ffn.expert_size);
}

void run_part(const Call& call, int64_t tokens, const Memory& memory, const Values& values) {
  const Ffn& ffn = call.ffn;
  const auto count = static_cast<int32_t>(tokens);
  if (ffn.adds_down_bias || ffn.neurons == 0) fill_rows(call, count, values.y);
  if (ffn.neurons == 0) return;
  score(call, tokens, values.router_x, memory.scores);
  project(call, tokens, values.x, ffn.w_up, memory.up);
  if (ffn.w_gate != nullptr) project(call, tokens, values.x, ffn.w_gate, memory.gate);
  mask(call, count, memory);
  multiply(call.stream,
           {tokens, ffn.width, ffn.neurons, memory.up, ffn.w_down, false, values.y, ffn.type, ffn.type,
            ffn.adds_down_bias ? 1.0f : 0.0f});
}

}  // namespace

void fill_rows(const Call& call, int32_t tokens, void* y) {
  const Grid grid{static_cast<unsigned>(tokens), static_cast<unsigned>(parts(call.ffn.width, kFillColumns))};
  launch(call.kernels.fill, grid, call.stream, y, call.ffn.b_down, call.ffn.width);
}

void run_prompt(const Call& call, int64_t tokens, const Values& values) {
  const Memory memory = take(call, std::min(tokens, kPromptTokens));
  for (int64_t first = 0; first < tokens; first += kPromptTokens)
    run_part(call, std::min(kPromptTokens, tokens - first), memory, from(call.ffn, values, first));
}

}  // namespace lte::cuda
