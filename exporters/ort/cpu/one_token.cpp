#include <algorithm>

#include "ffn.h"

namespace lte::cpu {

namespace {

// Sums of separate parts of the selected rows, added up at the end in their order. Their number must not depend on the
// threads, or the result would; 16 keep a large machine busy.
constexpr int64_t kMaxParts = 16;

// Weights that are worth handing to another thread: some ten microseconds of one core.
constexpr int64_t kPartWeights = 1 << 16;

int64_t count_parts(int64_t rows, int64_t weights_per_row) {
  return std::clamp<int64_t>(rows * weights_per_row / kPartWeights, 1, std::min(kMaxParts, rows));
}

// Of all rows of the runs, those from the first-th to the last-th.
std::vector<Rows> cut(const std::vector<Rows>& runs, int64_t first, int64_t last) {
  std::vector<Rows> found;
  int64_t before = 0;
  for (const Rows& run : runs) {
    const int64_t begin = std::max(first - before, int64_t{0}), end = std::min(last - before, run.count());
    if (begin < end) found.push_back({run.begin + begin, run.begin + end});
    before += run.count();
  }
  return found;
}

}  // namespace

template <typename Element>
void add_one_token(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const float* x,
                   float* y) {
  const Tokens<const float> token{x, ffn.width, nullptr, 1};
  const std::vector<Rows> runs = find_runs(selected, ffn.expert_size, ffn.neurons);
  int64_t rows = 0;
  for (const Rows& run : runs) rows += run.count();
  if (rows == 0) return;

  const auto& loops = machine.simd.loops<Element>();
  const int64_t parts = count_parts(rows, ffn.width * (ffn.w_gate == nullptr ? 2 : 3));
  const Scratch sums = machine.scratch(parts * ffn.width), values = machine.scratch(2 * rows);
  machine.parallel.for_each(static_cast<size_t>(parts), [&](size_t task) {
    const auto part = static_cast<int64_t>(task);
    const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    float *hidden = values.get() + 2 * first, *gate = hidden + (last - first), *sum = sums.get() + part * ffn.width;
    std::fill_n(sum, ffn.width, 0.0f);
    const std::vector<Rows> some = cut(runs, first, last);
    for (size_t i = 0; i < some.size(); ++i) {
      compute_hidden(ffn, machine, some[i], token, hidden, gate);
      const Element* next = ffn.w_up + some[std::min(i + 1, some.size() - 1)].begin * ffn.width;
      loops.add_rows(hidden, ffn.w_down + some[i].begin * ffn.width, some[i].count(), ffn.width, next, sum);
    }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t d = 0; d < ffn.width; ++d) y[d] += sums[static_cast<size_t>(part * ffn.width + d)];
}

template void add_one_token(const Ffn<float>&, const Machine&, const Selected&, const float*, float*);
template void add_one_token(const Ffn<Half>&, const Machine&, const Selected&, const float*, float*);
template void add_one_token(const Ffn<BFloat16>&, const Machine&, const Selected&, const float*, float*);

}  // namespace lte::cpu
