#include <algorithm>
#include <type_traits>

#include "ffn.h"

namespace lte::cpu {

namespace {

// Columns of rows that are copied together, at most.
constexpr int64_t kMaxCopied = 576;

// Some rows, one with each product of 192 rows of a panel: a quarter of a line with each of these.
template <typename Element>
Ahead rows_ahead(const Element* first, int64_t width, int64_t rows) {
  return {reinterpret_cast<const char*>(first), kLine / 4, width * static_cast<int64_t>(sizeof(Element)), rows};
}

// Whether rows lie so that several share a set of a level-1 cache.
template <typename Element>
bool must_copy(int64_t width) {
  constexpr int64_t kSets = 4096;  // bytes
  return !std::is_same_v<Element, float> || width * static_cast<int64_t>(sizeof(float)) % kSets == 0;
}

}  // namespace

Columns::Columns(const Machine& machine, const Tokens<const float>& x, int64_t width)
    : width_(width), panels_((x.count + kPanel - 1) / kPanel), values_(machine.scratch(panels_ * width * kPanel)) {
  machine.parallel.for_each(static_cast<size_t>(panels_), [&](size_t task) {
    const int64_t first = static_cast<int64_t>(task) * kPanel;
    float* to = values_.get() + first * width;
    machine.simd.of_float.transpose(x[first], x.stride, std::min(kPanel, x.count - first), width, to, kPanel);
  });
}

template <typename Element>
void multiply_rows(const Machine& machine, const Element* rows, const Element* bias, int64_t count, int64_t width,
                   const Columns& x, const Element* next, float* products) {
  const Simd& simd = machine.simd;
  for (int64_t r = 0; r < count; ++r) {
    float value = 0.0f;
    if (bias != nullptr) simd.loops<Element>().widen(bias + r, 1, &value);
    std::fill_n(products + r * x.stride(), x.stride(), value);
  }
  const bool copies = must_copy<Element>(width);
  const int64_t step = copies ? even_share(width, kMaxCopied) : width;
  const Scratch copy = machine.scratch(copies ? count * step : 0);
  for (int64_t start = 0; start < width; start += step) {
    const int64_t columns = std::min(step, width - start), share = even_share(columns, kMaxPanelColumns);
    Ahead ahead = rows_ahead(start + columns < width ? rows + start + columns : next, width, count);
    const float* some = copy.get();
    if (copies)
      for (int64_t r = 0; r < count; ++r)
        simd.loops<Element>().widen(rows + r * width + start, columns, copy.get() + r * step);
    else if constexpr (std::is_same_v<Element, float>)
      some = rows;
    for (int64_t column = 0; column < columns; column += share)
      for (int64_t panel = 0; panel < x.panels(); ++panel)
        simd.add_panel({some + column, step, nullptr, count}, x.panel(panel, start + column),
                       std::min(share, columns - column),
                       {products + panel * kPanel, x.stride(), nullptr, count}, ahead);
  }
}

#define LTE_INSTANTIATE(Element)                                                                                  \
  template void multiply_rows(const Machine&, const Element*, const Element*, int64_t, int64_t, const Columns&,   \
                              const Element*, float*);
LTE_INSTANTIATE(float)
LTE_INSTANTIATE(Half)
LTE_INSTANTIATE(BFloat16)
#undef LTE_INSTANTIATE

}  // namespace lte::cpu
