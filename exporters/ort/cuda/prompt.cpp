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

// x w^T, in `type`
void project(const Call& call, int64_t tokens, const void* x, const void* w, int64_t rows, DataType type,
             void* result) {
  multiply(call.stream, {tokens, rows, call.ffn.width, x, w, true, result, call.ffn.type, type, 0.0f});
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

void run_part(const Call& call, int64_t tokens, const Memory& memory, const void* x, void* y) {
  const Ffn& ffn = call.ffn;
  const auto count = static_cast<int32_t>(tokens);
  if (ffn.adds_down_bias || ffn.neurons == 0) fill_rows(call, count, y);
  if (ffn.neurons == 0) return;
  project(call, tokens, x, ffn.w_router, ffn.experts, DataType::kFloat, memory.scores);
  project(call, tokens, x, ffn.w_up, ffn.neurons, ffn.type, memory.up);
  if (ffn.w_gate != nullptr) project(call, tokens, x, ffn.w_gate, ffn.neurons, ffn.type, memory.gate);
  mask(call, count, memory);
  multiply(call.stream,
           {tokens, ffn.width, ffn.neurons, memory.up, ffn.w_down, false, y, ffn.type, ffn.type,
            ffn.adds_down_bias ? 1.0f : 0.0f});
}

}  // namespace

void fill_rows(const Call& call, int32_t tokens, void* y) {
  const Grid grid{static_cast<unsigned>(tokens), static_cast<unsigned>(parts(call.ffn.width, kFillColumns))};
  launch(call.kernels.fill, grid, call.stream, y, call.ffn.b_down, call.ffn.width);
}

void run_prompt(const Call& call, int64_t tokens, const void* x, void* y) {
  const Memory memory = take(call, std::min(tokens, kPromptTokens));
  const int64_t row = call.ffn.width * static_cast<int64_t>(element_bytes(call.ffn.type));
  for (int64_t first = 0; first < tokens; first += kPromptTokens) {
    const int64_t count = std::min(kPromptTokens, tokens - first);
    run_part(call, count, memory, offset(x, first * row), offset(y, first * row));
  }
}

}  // namespace lte::cuda
