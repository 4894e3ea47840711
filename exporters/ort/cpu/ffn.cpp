#include "ffn.h"

#include <algorithm>

namespace lte::cpu {

namespace {

// Tokens computed together: enough that reading the weights again for the next block costs little.
constexpr int64_t kBlockTokens = 256;

// Columns multiplied before the next ones, at most: four rows of weights and four tokens of them fit a level-1 cache.
constexpr int64_t kMaxColumns = 768;

// From here on, turning weights into panels costs less than it saves.
constexpr int64_t kPanelTokens = 16;

// Experts scored by one task, at most.
constexpr int64_t kScoreRows = 32;

// Calls score(first, count) for about equal parts of the experts.
template <typename Score>
void for_experts(const Machine& machine, int64_t experts, const Score& score) {
  const int64_t tasks = (experts + kScoreRows - 1) / kScoreRows;
  if (tasks == 0) return;
  const int64_t share = ((experts + tasks - 1) / tasks + kRows - 1) / kRows * kRows;
  machine.parallel.for_each(static_cast<size_t>((experts + share - 1) / share), [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * share;
    score(first, std::min(share, experts - first));
  });
}

// project for a whole panel of rows and many tokens: worth turning the rows into columns first.
template <typename Element>
void add_by_panel(const Machine& machine, const Element* rows, int64_t width, const Tokens<const float>& x,
                  float* sums) {
  const Simd& simd = machine.simd;
  const int64_t step = even_share(width, kMaxPanelColumns);
  const Scratch panel = machine.scratch(step * kPanel);
  for (int64_t column = 0; column < width; column += step) {
    const int64_t columns = std::min(step, width - column);
    simd.loops<Element>().transpose(rows + column, width, kPanel, columns, panel.get(), kPanel);
    const Tokens<const float> part{x.values + column, x.stride, x.members, x.count};
    Ahead nothing{};
    simd.add_panel(part, panel.get(), columns, {sums, kPanel, nullptr, x.count}, nothing);
  }
}

// sums[t * count + r] = x[t] . rows[r] + bias[r]; `next` is what is read after the rows
template <typename Element>
void project(const Machine& machine, const Element* rows, const Element* bias, int64_t count, int64_t width,
             const Tokens<const float>& x, const Element* next, float* sums) {
  const auto& loops = machine.simd.loops<Element>();
  for (int64_t t = 0; t < x.count; ++t) {
    if (bias != nullptr)
      loops.widen(bias, count, sums + t * count);
    else
      std::fill_n(sums + t * count, count, 0.0f);
  }
  if (count == kPanel && x.count >= kPanelTokens) return add_by_panel(machine, rows, width, x, sums);
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
  for_experts(machine, experts, [&](int64_t first, int64_t count) {
    const Scratch scores = machine.scratch(x.count * count);
    const Element* bias = ffn.b_router == nullptr ? nullptr : ffn.b_router + first;
    const Element* rows = ffn.w_router + first * width;
    project(machine, rows, bias, count, width, x, rows + count * width, scores.get());
    machine.simd.activate(Activation::kSigmoid, scores.get(), x.count * count);
    for (int64_t t = 0; t < x.count; ++t)
      for (int64_t e = 0; e < count; ++e)
        selected[static_cast<size_t>((first + e) * x.count + t)] =
            scores[static_cast<size_t>(t * count + e)] > ffn.threshold;
  });
  return selected;
}

// The same for many tokens.
template <typename Element>
Selected select_experts(const Ffn<Element>& ffn, const Machine& machine, const Columns& x, int64_t tokens) {
  const int64_t experts = ffn.experts, width = ffn.router_width;
  Selected selected(static_cast<size_t>(tokens * experts));
  for_experts(machine, experts, [&](int64_t first, int64_t count) {
    const Scratch scores = machine.scratch(count * x.stride());
    const Element* bias = ffn.b_router == nullptr ? nullptr : ffn.b_router + first;
    const Element* rows = ffn.w_router + first * width;
    multiply_rows(machine, rows, bias, count, width, x, ffn.w_up, scores.get());
    machine.simd.activate(Activation::kSigmoid, scores.get(), count * x.stride());
    for (int64_t e = 0; e < count; ++e)
      for (int64_t t = 0; t < tokens; ++t)
        selected[static_cast<size_t>((first + e) * tokens + t)] =
            scores[static_cast<size_t>(e * x.stride() + t)] > ffn.threshold;
  });
  return selected;
}

// Values as float32, in `memory` where they are not already.
const float* widened(const Machine&, const float* from, int64_t, Scratch&) { return from; }

template <typename Element>
const float* widened(const Machine& machine, const Element* from, int64_t count, Scratch& memory) {
  memory = machine.scratch(count);
  machine.simd.loops<Element>().widen(from, count, memory.get());
  return memory.get();
}

template <typename Element>
void run_selected(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected,
                  const Tokens<const float>& x, Element* y) {
  const auto& loops = machine.simd.loops<Element>();
  const int64_t stride = (ffn.width + kPanel - 1) / kPanel * kPanel;
  const Scratch sums = machine.scratch(x.count * stride);
  std::fill_n(sums.get(), x.count * stride, 0.0f);
  if (ffn.b_down != nullptr)
    for (int64_t t = 0; t < x.count; ++t) loops.widen(ffn.b_down, ffn.width, sums.get() + t * stride);
  if (x.count == 1)
    add_one_token(ffn, machine, selected, x[0], sums.get());
  else
    add_block(ffn, machine, selected, x, sums.get(), stride);
  for (int64_t t = 0; t < x.count; ++t) loops.narrow(sums.get() + t * stride, ffn.width, y + t * ffn.width);
}

// A block of tokens, some tens at least: columns of them, multiplied by all experts or by those that were selected.
template <typename Element>
void run_many(const Ffn<Element>& ffn, const Machine& machine, const Tokens<const float>& x,
              const Tokens<const float>& router_x, Element* y) {
  const Columns columns(machine, x, ffn.width);
  const Selected selected =
      router_x.values == x.values
          ? select_experts(ffn, machine, columns, x.count)
          : select_experts(ffn, machine, Columns(machine, router_x, ffn.router_width), x.count);
  if (is_mostly_selected(selected, x.count, ffn.experts))
    return compute_masked(ffn, machine, selected, columns, x.count, y);
  run_selected(ffn, machine, selected, x, y);
}

template <typename Element>
void run_block(const Ffn<Element>& ffn, const Machine& machine, int64_t tokens, const Element* x,
               const Element* router_x, Element* y) {
  Scratch x_memory, router_memory;
  const float* wide_x = widened(machine, x, tokens * ffn.width, x_memory);
  const float* wide_router_x =
      router_x == x ? wide_x : widened(machine, router_x, tokens * ffn.router_width, router_memory);
  const Tokens<const float> all{wide_x, ffn.width, nullptr, tokens};
  const Tokens<const float> scored{wide_router_x, ffn.router_width, nullptr, tokens};
  if (tokens >= kPanelTokens) return run_many(ffn, machine, all, scored, y);
  run_selected(ffn, machine, select_experts(ffn, machine, scored), all, y);
}

}  // namespace

Scratch Machine::scratch(int64_t count) const {
  void* values = memory.take(static_cast<size_t>(count) * sizeof(float));
  return Scratch(static_cast<float*>(values), GivenBack{&memory});
}

std::vector<Rows> find_runs(const std::vector<char>& is_wanted, int64_t expert_size, int64_t neurons) {
  std::vector<Rows> runs;
  for (size_t expert = 0; expert < is_wanted.size(); ++expert) {
    if (!is_wanted[expert]) continue;
    const int64_t begin = static_cast<int64_t>(expert) * expert_size;
    const int64_t end = begin + std::min(expert_size, neurons - begin);
    if (!runs.empty() && runs.back().end == begin)
      runs.back().end = end;
    else
      runs.push_back({begin, end});
  }
  return runs;
}

int64_t even_share(int64_t total, int64_t limit) {
  const int64_t parts = (total + limit - 1) / limit;
  return ((total + parts - 1) / parts + kPanel - 1) / kPanel * kPanel;
}

void append_tiles(int64_t expert, int64_t expert_size, int64_t neurons, std::vector<Rows>& tiles) {
  const int64_t begin = expert * expert_size, end = begin + std::min(expert_size, neurons - begin);
  for (int64_t row = begin; row < end; row += kTileRows) tiles.push_back({row, std::min(row + kTileRows, end)});
}

template <typename Element>
void compute_hidden(const Ffn<Element>& ffn, const Machine& machine, Rows rows, const Tokens<const float>& x,
                    float* hidden, float* gate) {
  const Simd& simd = machine.simd;
  const int64_t count = rows.count(), width = ffn.width, total = x.count * count;
  const auto of = [&](const Element* weights) { return weights == nullptr ? nullptr : weights + rows.begin * width; };
  const auto bias = [&](const Element* values) { return values == nullptr ? nullptr : values + rows.begin; };
  const Element *up_rows = of(ffn.w_up), *gate_rows = of(ffn.w_gate), *down_rows = of(ffn.w_down);
  project(machine, up_rows, bias(ffn.b_up), count, width, x, gate_rows == nullptr ? down_rows : gate_rows, hidden);
  if (gate_rows == nullptr) return simd.activate(ffn.activation, hidden, total);
  project(machine, gate_rows, bias(ffn.b_gate), count, width, x, down_rows, gate);
  simd.activate(ffn.activation, gate, total);
  simd.multiply(gate, hidden, total);
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
  template void compute_hidden(const Ffn<Element>&, const Machine&, Rows, const Tokens<const float>&, float*,       \
                               float*);                                                                             \
  template void run(const Ffn<Element>&, const Machine&, int64_t, const Element*, const Element*, Element*);
LTE_INSTANTIATE(float)
LTE_INSTANTIATE(Half)
LTE_INSTANTIATE(BFloat16)
#undef LTE_INSTANTIATE

}  // namespace lte::cpu
