// One token of a layer with long rows, as kernels/triton_decode_list.py launches it: scores, then hidden values of
// active experts by as many programs as run at once, then their rows of w_down.
#include "ffn.h"

namespace lte::cuda {

namespace {

// Bytes of w_up from which on three launches are faster than two (kernels/triton_decode.py).
constexpr int64_t kLargeBytes = int64_t{1} << 24;

struct Memory {
  void* hidden;      // [F], float32
  void* partial;     // [splits, D], float32
  void* selected;    // [E], int32
  void* arrived;     // a counter for each block of columns, int32
  void* up_lists;    // of active experts, one for each program, int32
  void* down_lists;
};

Memory take(const Call& call, int32_t programs, int32_t blocks) {
  const Ffn& ffn = call.ffn;
  const auto [hidden, partial, selected, arrived, up_lists, down_lists] =
      take_all(call.scratch,
               {int64_t{4} * ffn.neurons, int64_t{4} * kLargeDownSplits * ffn.width, int64_t{4} * ffn.experts,
                int64_t{4} * blocks, int64_t{4} * programs * kListSmall,
                int64_t{4} * blocks * kLargeDownSplits * kListSmall});
  return {hidden, partial, selected, arrived, up_lists, down_lists};
}

// For rows of so many columns.
const Kernels::Large& choose(const Kernels& kernels, int32_t columns) {
  if (columns <= kNarrow) return kernels.narrow;
  return columns <= kMiddle ? kernels.middle : kernels.broad;
}

void launch_up(const Call& call, const Kernels::Large& kernels, const Memory& memory, const void* x) {
  const Ffn& ffn = call.ffn;
  const Grid grid{static_cast<unsigned>(kernels.programs), 1};
  const auto number = static_cast<int32_t>(ffn.activation);
  if (ffn.w_gate == nullptr)
    return launch(kernels.up, grid, call.stream, x, memory.selected, memory.up_lists, ffn.w_up, ffn.b_up, number,
                  memory.hidden, ffn.neurons, ffn.width, ffn.width, ffn.experts);
  launch(kernels.up, grid, call.stream, x, memory.selected, memory.up_lists, ffn.w_up, ffn.w_gate, ffn.b_up, ffn.b_gate,
         number, memory.hidden, ffn.neurons, ffn.width, ffn.width, ffn.experts);
}

}  // namespace

bool fits_large(const Ffn& ffn, const Values& values) {
  const int64_t bytes = static_cast<int64_t>(element_bytes(ffn.type)) * ffn.neurons * ffn.width;
  return ffn.type != DataType::kFloat && bytes >= kLargeBytes && ffn.width <= kBroad && ffn.router_width <= kBroad &&
         ffn.experts <= kListSmall && ffn.expert_size == kPaperSize && is_wide(ffn, values);
}

void run_large_layer(const Call& call, const Values& values) {
  const Ffn& ffn = call.ffn;
  const Kernels::Large& kernels = choose(call.kernels, ffn.width);
  const Kernel& scores = choose(call.kernels, ffn.router_width).scores;
  const int32_t blocks = parts(ffn.width, kLargeDownColumns);
  const Memory memory = take(call, kernels.programs, blocks);
  launch(scores, {static_cast<unsigned>(ffn.experts), 1}, call.stream, values.router_x, ffn.w_router, ffn.b_router,
         memory.selected, memory.arrived, ffn.threshold, ffn.router_width, blocks);
  launch_up(call, kernels, memory, values.x);
  launch(kernels.down, {static_cast<unsigned>(blocks), kLargeDownSplits}, call.stream, memory.hidden, memory.selected,
         memory.down_lists, ffn.w_down, ffn.b_down, memory.partial, memory.arrived, values.y, ffn.neurons, ffn.width,
         ffn.experts);
}

}  // namespace lte::cuda
