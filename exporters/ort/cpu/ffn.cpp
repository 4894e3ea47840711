#include "ffn.h"

#include <algorithm>

namespace lte::cpu {

namespace {

// Tokens computed together: enough that reading the weights again for the next block costs little.
constexpr int64_t kBlockTokens = 256;

// Columns multiplied before the next ones, at most: four rows of weights and four tokens of them fit a level-1 cache.
constexpr int64_t kMaxColumns = 768;

// The same for a panel: 192 x 32 floats of it leave room for the tokens in a level-1 cache of 32 KiB.
constexpr int64_t kMaxPanelColumns = 192;

// From here on, turning weights into panels costs less than it saves.
constexpr int64_t kPanelTokens = 16;

// Experts scored by one task.
constexpr int64_t kScoreRows = 32;

// The length of a part when `total` is cut into parts alike: a multiple of the panel, about `limit` at most.
int64_t even_share(int64_t total, int64_t limit) {
  const int64_t parts = (total + limit - 1) / limit;
  return ((total + parts - 1) / parts + kPanel - 1) / kPanel * kPanel;
}

// project for a whole panel of rows and many tokens: worth turning the rows into columns first.
template <typename Element>
void add_by_panel(const Simd& simd, const Element* rows, int64_t width, const Tokens<const float>& x, float* sums) {
  const int64_t step = even_share(width, kMaxPanelColumns);
  const auto panel = scratch(step * kPanel);
  for (int64_t column = 0; column < width; column += step) {
    const int64_t columns = std::min(step, width - column);
    simd.loops<Element>().transpose(rows + column, width, columns, panel.get());
    const Tokens<const float> part{x.values + column, x.stride, x.members, x.count};
    simd.add_panel(part, panel.get(), columns, {sums, kPanel, nullptr, x.count});
  }
}

// sums[t * count + r] = x[t] . rows[r] + bias[r]; `next` is what is read after the rows
template <typename Element>
void project(const Simd& simd, const Element* rows, const Element* bias, int64_t count, int64_t width,
             const Tokens<const float>& x, const Element* next, float* sums) {
  const auto& loops = simd.loops<Element>();
  for (int64_t t = 0; t < x.count; ++t) {
    if (bias != nullptr)
      loops.widen(bias, count, sums + t * count);
    else
      std::fill_n(sums + t * count, count, 0.0f);
  }
  if (count == kPanel && x.count >= kPanelTokens) return add_by_panel(simd, rows, width, x, sums);
  // One token reads each row from end to end.
  const int64_t step = x.count == 1 ? width : even_share(width, kMaxColumns);
  for (int64_t column = 0; column < width; column += step) {
    const Tokens<const float> part{x.values + column, x.stride, x.members, x.count};
    loops.add_dots(part, rows + column, width, count, std::min(step, width - column), next, sums, count);
  }
}

template <typename Element>
Selected select_experts(const Ffn<Element>& ffn, const Machine& machine, const Tokens<const float>& x) {
  const int64_t experts = ffn.experts, width = ffn.router_width;
  Selected selected(static_cast<size_t>(x.count * experts));
  const auto tasks = static_cast<size_t>((experts + kScoreRows - 1) / kScoreRows);
  machine.parallel.for_each(tasks, [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * kScoreRows, count = std::min(kScoreRows, experts - first);
    const auto scores = scratch(x.count * count);
    const Element* bias = ffn.b_router == nullptr ? nullptr : ffn.b_router + first;
    const Element* rows = ffn.w_router + first * width;
    project(machine.simd, rows, bias, count, width, x, rows + count * width, scores.get());
    machine.simd.activate(Activation::kSigmoid, scores.get(), x.count * count);
    for (int64_t t = 0; t < x.count; ++t)
      for (int64_t e = 0; e < count; ++e)
        selected[static_cast<size_t>(t * experts + first + e)] =
            scores[static_cast<size_t>(t * count + e)] > ffn.threshold;
  });
  return selected;
}

template <typename Element>
Selected select_experts(const Ffn<Element>& ffn, const Machine& machine, int64_t tokens, const Element* router_x) {
  const auto wide = scratch(tokens * ffn.router_width);
  machine.simd.loops<Element>().widen(router_x, tokens * ffn.router_width, wide.get());
  return select_experts(ffn, machine, {wide.get(), ffn.router_width, nullptr, tokens});
}

template <typename Element>
void run_block(const Ffn<Element>& ffn, const Machine& machine, int64_t tokens, const Element* x,
               const Element* router_x, Element* y) {
  const auto& loops = machine.simd.loops<Element>();
  const int64_t stride = (ffn.width + kPanel - 1) / kPanel * kPanel;
  const auto wide_x = scratch(tokens * ffn.width), wide_y = scratch(tokens * stride);
  loops.widen(x, tokens * ffn.width, wide_x.get());
  const Tokens<const float> all{wide_x.get(), ffn.width, nullptr, tokens};
  const Selected selected =
      router_x == x ? select_experts(ffn, machine, all) : select_experts(ffn, machine, tokens, router_x);
  std::fill_n(wide_y.get(), tokens * stride, 0.0f);
  if (ffn.b_down != nullptr)
    for (int64_t t = 0; t < tokens; ++t) loops.widen(ffn.b_down, ffn.width, wide_y.get() + t * stride);
  if (tokens == 1) {
    add_one_token(ffn, machine, selected, wide_x.get(), wide_y.get());
  } else {
    add_block(ffn, machine, selected, all, wide_y.get(), stride);
  }
  for (int64_t t = 0; t < tokens; ++t) loops.narrow(wide_y.get() + t * stride, ffn.width, y + t * ffn.width);
}

}  // namespace

void append_tiles(int64_t expert, int64_t expert_size, int64_t neurons, std::vector<Rows>& tiles) {
  const int64_t begin = expert * expert_size, end = begin + std::min(expert_size, neurons - begin);
  for (int64_t row = begin; row < end; row += kTileRows) tiles.push_back({row, std::min(row + kTileRows, end)});
}

template <typename Element>
void compute_hidden(const Ffn<Element>& ffn, const Simd& simd, Rows rows, const Tokens<const float>& x, float* hidden,
                    float* gate) {
  const int64_t count = rows.count(), width = ffn.width, total = x.count * count;
  const auto of = [&](const Element* weights) { return weights == nullptr ? nullptr : weights + rows.begin * width; };
  const auto bias = [&](const Element* values) { return values == nullptr ? nullptr : values + rows.begin; };
  const Element *up_rows = of(ffn.w_up), *gate_rows = of(ffn.w_gate), *down_rows = of(ffn.w_down);
  project(simd, up_rows, bias(ffn.b_up), count, width, x, gate_rows == nullptr ? down_rows : gate_rows, hidden);
  if (gate_rows == nullptr) return simd.activate(ffn.activation, hidden, total);
  project(simd, gate_rows, bias(ffn.b_gate), count, width, x, down_rows, gate);
  simd.activate(ffn.activation, gate, total);
  for (int64_t i = 0; i < total; ++i) hidden[i] *= gate[i];
}

template <typename Element>
void run(const Ffn<Element>& ffn, const Machine& machine, int64_t tokens, const Element* x, const Element* router_x,
         Element* y) {
  for (int64_t first = 0; first < tokens; first += kBlockTokens) {
    const int64_t start = first * ffn.width, router_start = first * ffn.router_width;
    run_block(ffn, machine, std::min(kBlockTokens, tokens - first), x + start, router_x + router_start, y + start);
  }
}

#define LTE_INSTANTIATE(Element)                                                                                    \
  template void compute_hidden(const Ffn<Element>&, const Simd&, Rows, const Tokens<const float>&, float*, float*); \
  template void run(const Ffn<Element>&, const Machine&, int64_t, const Element*, const Element*, Element*);
LTE_INSTANTIATE(float)
LTE_INSTANTIATE(Half)
LTE_INSTANTIATE(BFloat16)
#undef LTE_INSTANTIATE

}  // namespace lte::cpu
