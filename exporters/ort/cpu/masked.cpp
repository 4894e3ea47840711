#include <algorithm>
#include <vector>

#include "ffn.h"

namespace lte::cpu {

namespace {

// Neurons computed by one task: their weights are read from memory once and stay in a level-2 cache for all tokens.
constexpr int64_t kTaskNeurons = 96;

// Neurons multiplied before the next ones: their part of a panel and of the hidden values of a few tokens, a cache line
// for each, fit a level-1 cache of 32 KiB.
constexpr int64_t kMaxDownNeurons = 128;

// Columns of y that one task computes, at most, and about how many tasks a narrow y is cut into.
constexpr int64_t kMaxStrip = 256, kMinStrips = 6;

// Share of (token, expert) pairs from which on it pays to compute all of them.
constexpr double kMostly = 0.7;

// Some columns of rows, a line of all rows with each product.
template <typename Element>
Ahead columns_ahead(const Element* first, int64_t width, int64_t columns) {
  const auto size = static_cast<int64_t>(sizeof(Element));
  return {reinterpret_cast<const char*>(first), width * size, kLine, columns * size / kLine + 1};
}

// Hidden values in groups of tokens, [T / kGroup, F, kGroup], zero for tokens that did not select the neuron's expert.
struct Hidden {
  Scratch values;
  int64_t stride;  // from group to group
};

// values [rows, T], selected or not
template <typename Element>
void compute_neurons(const Ffn<Element>& ffn, const Machine& machine, const Columns& x, Rows rows, float* values) {
  const int64_t count = rows.count(), size = count * x.stride(), start = rows.begin * ffn.width;
  const auto bias = [&](const Element* all) { return all == nullptr ? nullptr : all + rows.begin; };
  const Element *up_rows = ffn.w_up + start, *next = ffn.w_up + rows.end * ffn.width;
  if (ffn.w_gate == nullptr) {
    multiply_rows(machine, up_rows, bias(ffn.b_up), count, ffn.width, x, next, values);
    return machine.simd.activate(ffn.activation, values, size);
  }
  const Element* gate_rows = ffn.w_gate + start;
  const Scratch gate = machine.scratch(size);
  multiply_rows(machine, up_rows, bias(ffn.b_up), count, ffn.width, x, gate_rows, values);
  multiply_rows(machine, gate_rows, bias(ffn.b_gate), count, ffn.width, x, next, gate.get());
  machine.simd.activate(ffn.activation, gate.get(), size);
  machine.simd.multiply(gate.get(), values, size);
}

template <typename Element>
void fill(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const Columns& x, int64_t tokens,
          Rows rows, const Hidden& hidden) {
  const Scratch values = machine.scratch(rows.count() * x.stride()), kept = machine.scratch(tokens);
  compute_neurons(ffn, machine, x, rows, values.get());
  for (int64_t neuron = rows.begin; neuron < rows.end; ++neuron) {
    if (neuron == rows.begin || neuron % ffn.expert_size == 0)
      std::copy_n(selected.data() + neuron / ffn.expert_size * tokens, tokens, kept.get());
    machine.simd.keep(kept.get(), values.get() + (neuron - rows.begin) * x.stride(), tokens,
                      hidden.values.get() + neuron * kGroup, hidden.stride);
  }
}

// Adds some neurons to the columns [begin, end) of every token's y, whole panels of them; `panels` is scratch.
template <typename Element>
void add_neurons(const Ffn<Element>& ffn, const Simd& simd, const Hidden& hidden, Rows rows, int64_t begin,
                 int64_t end, float* panels, const Tokens<float>& y) {
  const Element* weights = ffn.w_down + rows.begin * ffn.width;
  simd.loops<Element>().copy_panels(weights, rows.count(), ffn.width, begin, end, panels);
  Ahead ahead = columns_ahead(weights + rows.count() * ffn.width + begin, ffn.width, end - begin);
  for (int64_t column = 0; column < end - begin; column += kPanel)
    for (int64_t t = 0; t < y.count; t += kGroup)
      simd.add_group(hidden.values.get() + t / kGroup * hidden.stride + rows.begin * kGroup,
                     panels + column * rows.count(), rows.count(),
                     {y[t] + column, y.stride, nullptr, std::min(kGroup, y.count - t)}, ahead);
}

// For each expert, whether any token selected it.
std::vector<char> find_used(const Selected& selected, int64_t tokens, int64_t experts) {
  std::vector<char> is_used;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const char* first = selected.data() + expert * tokens;
    is_used.push_back(std::find(first, first + tokens, char{1}) != first + tokens);
  }
  return is_used;
}

// The runs in parts of so many rows at most, about equal ones of each run.
std::vector<Rows> split(const std::vector<Rows>& runs, int64_t limit) {
  std::vector<Rows> parts;
  for (const Rows& run : runs) {
    const int64_t step = even_share(run.count(), limit);
    for (int64_t row = run.begin; row < run.end; row += step) parts.push_back({row, std::min(row + step, run.end)});
  }
  return parts;
}

}  // namespace

bool is_mostly_selected(const Selected& selected, int64_t tokens, int64_t experts) {
  const auto pairs = static_cast<double>(std::count(selected.begin(), selected.end(), char{1}));
  const std::vector<char> is_used = find_used(selected, tokens, experts);
  const auto used = std::count(is_used.begin(), is_used.end(), char{1});
  const int64_t computed = (tokens + kPanel - 1) / kPanel * kPanel * used;
  return pairs > kMostly * static_cast<double>(computed);
}

template <typename Element>
void compute_masked(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const Columns& x,
                    int64_t tokens, Element* y) {
  const std::vector<Rows> runs = find_runs(find_used(selected, tokens, ffn.experts), ffn.expert_size, ffn.neurons);
  const int64_t group_stride = ffn.neurons * kGroup;
  const Hidden hidden{machine.scratch((tokens + kGroup - 1) / kGroup * group_stride), group_stride};
  const std::vector<Rows> tasks = split(runs, kTaskNeurons);
  machine.parallel.for_each(tasks.size(),
                            [&](size_t task) { fill(ffn, machine, selected, x, tokens, tasks[task], hidden); });

  const auto& loops = machine.simd.loops<Element>();
  const std::vector<Rows> parts = split(runs, kMaxDownNeurons);
  const int64_t strip = std::min(even_share(ffn.width, ffn.width / kMinStrips + 1), kMaxStrip);
  machine.parallel.for_each(static_cast<size_t>((ffn.width + strip - 1) / strip), [&](size_t task) {
    const int64_t begin = static_cast<int64_t>(task) * strip, columns = std::min(strip, ffn.width - begin);
    const Scratch sums = machine.scratch(tokens * strip), panels = machine.scratch(kMaxDownNeurons * strip);
    std::fill_n(sums.get(), tokens * strip, 0.0f);
    if (ffn.b_down != nullptr)
      for (int64_t t = 0; t < tokens; ++t) loops.widen(ffn.b_down + begin, columns, sums.get() + t * strip);
    for (const Rows& rows : parts)
      add_neurons(ffn, machine.simd, hidden, rows, begin, begin + strip, panels.get(),
                  {sums.get(), strip, nullptr, tokens});
    for (int64_t t = 0; t < tokens; ++t) loops.narrow(sums.get() + t * strip, columns, y + t * ffn.width + begin);
  });
}

#define LTE_INSTANTIATE(Element)                                                                                \
  template void compute_masked(const Ffn<Element>&, const Machine&, const Selected&, const Columns&, int64_t,   \
                               Element*);
LTE_INSTANTIATE(float)
LTE_INSTANTIATE(Half)
LTE_INSTANTIATE(BFloat16)
#undef LTE_INSTANTIATE

}  // namespace lte::cpu
