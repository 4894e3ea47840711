#include <algorithm>

#include "ffn.h"

namespace lte::cpu {

namespace {

// Sums of separate parts of the tiles, added up at the end in the order of the tiles. Their number must not depend on
// the threads, or the result would; 16 keep a large machine busy.
constexpr int64_t kMaxParts = 16;

// Weights that are worth handing to another thread: some ten microseconds of one core.
constexpr int64_t kPartWeights = 1 << 16;

int64_t count_parts(const std::vector<Rows>& tiles, int64_t weights_per_row) {
  int64_t rows = 0;
  for (const Rows& tile : tiles) rows += tile.count();
  const int64_t worthwhile = std::clamp<int64_t>(rows * weights_per_row / kPartWeights, 1, kMaxParts);
  return std::min(worthwhile, static_cast<int64_t>(tiles.size()));
}

}  // namespace

template <typename Element>
void add_one_token(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const float* x,
                   float* y) {
  const Tokens<const float> token{x, ffn.width, nullptr, 1};
  std::vector<Rows> tiles;
  for (int64_t expert = 0; expert < ffn.experts; ++expert)
    if (selected[static_cast<size_t>(expert)]) append_tiles(expert, ffn.expert_size, ffn.neurons, tiles);
  if (tiles.empty()) return;

  const auto& loops = machine.simd.loops<Element>();
  const int64_t parts = count_parts(tiles, ffn.width * (ffn.w_gate == nullptr ? 2 : 3));
  const auto sums = scratch(parts * ffn.width);
  machine.parallel.for_each(static_cast<size_t>(parts), [&](size_t part) {
    const size_t first = tiles.size() * part / static_cast<size_t>(parts);
    const size_t last = tiles.size() * (part + 1) / static_cast<size_t>(parts);
    float* sum = sums.get() + static_cast<int64_t>(part) * ffn.width;
    std::fill_n(sum, ffn.width, 0.0f);
    for (size_t tile = first; tile < last; ++tile) {
      float hidden[kTileRows], gate[kTileRows];
      compute_hidden(ffn, machine.simd, tiles[tile], token, hidden, gate);
      const Rows rows = tiles[tile];
      const Element* next = ffn.w_up + tiles[std::min(tile + 1, last - 1)].begin * ffn.width;
      loops.add_rows(hidden, ffn.w_down + rows.begin * ffn.width, rows.count(), ffn.width, next, sum);
    }
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t d = 0; d < ffn.width; ++d) y[d] += sums[static_cast<size_t>(part * ffn.width + d)];
}

template void add_one_token(const Ffn<float>&, const Machine&, const Selected&, const float*, float*);
template void add_one_token(const Ffn<Half>&, const Machine&, const Selected&, const float*, float*);
template void add_one_token(const Ffn<BFloat16>&, const Machine&, const Selected&, const float*, float*);

}  // namespace lte::cpu
