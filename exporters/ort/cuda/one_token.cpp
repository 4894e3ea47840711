// One token, as kernels/triton_decode.py launches it: hidden values of active experts, then their rows of w_down.
#include "ffn.h"

namespace lte::cuda {

namespace {

struct Memory {
  void* hidden;   // [F], float32
  void* partial;  // [splits, D], float32
  void* active;   // [E], int32
  void* arrived;  // a counter for each block of columns, int32
};

Memory take(const Call& call, int32_t blocks) {
  const Ffn& ffn = call.ffn;
  const auto [hidden, partial, active, arrived] = take_all(
      call.scratch, {int64_t{4} * ffn.neurons, int64_t{4} * kOneDownSplits * ffn.width, int64_t{4} * ffn.experts,
                     int64_t{4} * blocks});
  return {hidden, partial, active, arrived};
}

void launch_up(const Call& call, const Kernel& kernel, const Memory& memory, int32_t blocks, const Values& values) {
  const Ffn& ffn = call.ffn;
  const void *x = values.x, *router_x = values.router_x;
  const Grid grid{static_cast<unsigned>(ffn.experts * parts(ffn.expert_size, kOneUpRows)), 1};
  const auto number = static_cast<int32_t>(ffn.activation);
  if (ffn.w_gate == nullptr)
    return launch(kernel, grid, call.stream, x, router_x, ffn.w_router, ffn.b_router, ffn.w_up, ffn.b_up, number,
                  memory.hidden, memory.active, memory.arrived, ffn.threshold, ffn.neurons, ffn.width,
                  ffn.router_width, ffn.width, ffn.expert_size, blocks);
  launch(kernel, grid, call.stream, x, router_x, ffn.w_router, ffn.b_router, ffn.w_up, ffn.w_gate, ffn.b_up,
         ffn.b_gate, number, memory.hidden, memory.active, memory.arrived, ffn.threshold, ffn.neurons, ffn.width,
         ffn.router_width, ffn.width, ffn.expert_size, blocks);
}

}  // namespace

void run_one_token(const Call& call, const Values& values) {
  const Ffn& ffn = call.ffn;
  void* const y = values.y;
  const bool wide = is_wide(ffn, values);
  const Kernels::One& kernels = wide ? call.kernels.one_wide : call.kernels.one_any;
  const int32_t blocks = parts(ffn.width, kOneDownColumns);
  const Memory memory = take(call, blocks);
  launch_up(call, kernels.up, memory, blocks, values);
  const Grid grid{static_cast<unsigned>(blocks), kOneDownSplits};
  if (wide && ffn.experts <= kListSmall && ffn.expert_size == kPaperSize)
    return launch(call.kernels.one_paper_down, grid, call.stream, memory.hidden, memory.active, ffn.w_down, ffn.b_down,
                  memory.partial, memory.arrived, y, ffn.neurons, ffn.width, ffn.experts);
  const Kernel& down = ffn.experts <= kListSmall ? kernels.small_down : kernels.large_down;
  launch(down, grid, call.stream, memory.hidden, memory.active, ffn.w_down, ffn.b_down, memory.partial, memory.arrived,
         y, ffn.neurons, ffn.width, ffn.experts, ffn.expert_size);
}

}  // namespace lte::cuda
