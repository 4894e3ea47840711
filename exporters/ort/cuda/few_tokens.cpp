// A few tokens, as kernels/triton_batch.py launches them: scores in parts, hidden values of the experts that any token
// selected, then their rows of w_down.
#include "ffn.h"

namespace lte::cuda {

namespace {

struct Memory {
  void* scores;   // [E, splits, T], float32
  void* hidden;   // [T, F]
  void* partial;  // [splits, T, D], float32
  void* active;   // [E], int32
  void* arrived;  // a counter for each block of columns, int32
};

Memory take(const Call& call, int64_t tokens, int32_t blocks) {
  const Ffn& ffn = call.ffn;
  const int64_t hidden = static_cast<int64_t>(element_bytes(ffn.type)) * tokens * ffn.neurons;
  const auto [scores, hidden_values, partial, active, arrived] =
      take_all(call.scratch, {4 * tokens * ffn.experts * kFewScoreSplits, hidden,
                              4 * tokens * ffn.width * kFewDownSplits, int64_t{4} * ffn.experts, int64_t{4} * blocks});
  return {scores, hidden_values, partial, active, arrived};
}

void launch_scores(const Call& call, const Kernel& kernel, const Memory& memory, int32_t tokens, int32_t blocks,
                   const void* router_x) {
  const Ffn& ffn = call.ffn;
  // Columns of one part; the last parts of a short row are empty.
  const int32_t span = parts(parts(ffn.router_width, kFewScoreSplits), kFewScoreColumns) * kFewScoreColumns;
  const Grid grid{static_cast<unsigned>(parts(ffn.experts, kFewScoreExperts)), kFewScoreSplits};
  launch(kernel, grid, call.stream, router_x, ffn.w_router, memory.scores, memory.arrived, tokens, ffn.router_width,
         ffn.experts, blocks, span);
}

void launch_up(const Call& call, const Kernel& kernel, const Memory& memory, int32_t tokens, const void* x) {
  const Ffn& ffn = call.ffn;
  const Grid grid{static_cast<unsigned>(ffn.experts * parts(ffn.expert_size, kFewUpNeurons)), 1};
  const auto number = static_cast<int32_t>(ffn.activation);
  if (ffn.w_gate == nullptr)
    return launch(kernel, grid, call.stream, x, memory.scores, ffn.b_router, ffn.w_up, ffn.b_up, number, memory.hidden,
                  memory.active, ffn.threshold, tokens, ffn.neurons, ffn.width, ffn.expert_size);
  launch(kernel, grid, call.stream, x, memory.scores, ffn.b_router, ffn.w_up, ffn.w_gate, ffn.b_up, ffn.b_gate, number,
         memory.hidden, memory.active, ffn.threshold, tokens, ffn.neurons, ffn.width, ffn.expert_size);
}

}  // namespace

void run_few_tokens(const Call& call, int32_t tokens, const Values& values) {
  const Ffn& ffn = call.ffn;
  const Kernels::Few& kernels = tokens <= kTokensSmall ? call.kernels.few_small : call.kernels.few_large;
  const int32_t blocks = parts(ffn.width, kFewDownColumns);
  const Memory memory = take(call, tokens, blocks);
  launch_scores(call, kernels.scores, memory, tokens, blocks, values.router_x);
  launch_up(call, kernels.up, memory, tokens, values.x);
  const Kernel& down = ffn.experts <= kListSmall ? kernels.small_down : kernels.large_down;
  launch(down, {static_cast<unsigned>(blocks), kFewDownSplits}, call.stream, memory.hidden, memory.active, ffn.w_down,
         ffn.b_down, memory.partial, memory.arrived, values.y, tokens, ffn.neurons, ffn.width, ffn.experts,
         ffn.expert_size);
}

}  // namespace lte::cuda
