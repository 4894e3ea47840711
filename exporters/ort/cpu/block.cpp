#include <algorithm>

#include "ffn.h"

namespace lte::cpu {

namespace {

// Columns of y that one task computes: its part of y stays in a level-2 cache, 256 tokens x 256 columns x 4 bytes.
constexpr int64_t kMaxStrip = 256;

// Tasks to cut a narrow y into, so that a few threads have something to share.
constexpr int64_t kMinStrips = 4;

// Some neurons of one expert and the tokens that selected it.
struct Tile {
  Rows rows;
  const int64_t* members;
  int64_t member_count;
  int64_t start;  // of its hidden values [member_count, rows.count()] among all
  int64_t size() const { return member_count * rows.count(); }
};

// For each expert, the tokens that selected it: members [starts[e], starts[e + 1]).
struct Groups {
  std::vector<int64_t> members;
  std::vector<int64_t> starts;
};

Groups group_by_expert(const Selected& selected, int64_t tokens, int64_t experts) {
  Groups groups;
  groups.starts.push_back(0);
  for (int64_t expert = 0; expert < experts; ++expert) {
    for (int64_t t = 0; t < tokens; ++t)
      if (selected[static_cast<size_t>(expert * tokens + t)]) groups.members.push_back(t);
    groups.starts.push_back(static_cast<int64_t>(groups.members.size()));
  }
  return groups;
}

std::vector<Tile> make_tiles(const Groups& groups, int64_t expert_size, int64_t neurons) {
  std::vector<Tile> tiles;
  int64_t start = 0;
  for (size_t expert = 0; expert + 1 < groups.starts.size(); ++expert) {
    const int64_t count = groups.starts[expert + 1] - groups.starts[expert];
    std::vector<Rows> rows;
    if (count > 0) append_tiles(static_cast<int64_t>(expert), expert_size, neurons, rows);
    for (const Rows& some : rows) {
      tiles.push_back({some, groups.members.data() + groups.starts[expert], count, start});
      start += tiles.back().size();
    }
  }
  return tiles;
}

// The columns [begin, end) of every token's y.
template <typename Element>
void add_strip(const Ffn<Element>& ffn, const Simd& simd, const std::vector<Tile>& tiles, const float* hidden,
               int64_t begin, int64_t end, float* y, int64_t stride) {
  alignas(64) float panels[kTileRows * kMaxStrip];
  for (const Tile& tile : tiles) {
    const int64_t count = tile.rows.count();
    const Element* rows = ffn.w_down + tile.rows.begin * ffn.width;
    simd.loops<Element>().copy_panels(rows, count, ffn.width, begin, end, panels);
    for (int64_t column = begin; column < end; column += kPanel) {
      const Tokens<float> targets{y + column, stride, tile.members, tile.member_count};
      const Tokens<const float> scales{hidden + tile.start, count, nullptr, tile.member_count};
      Ahead nothing{};
      simd.add_panel(scales, panels + (column - begin) * count, count, targets, nothing);
    }
  }
}

}  // namespace

template <typename Element>
void add_block(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const Tokens<const float>& x,
               float* y, int64_t stride) {
  const Groups groups = group_by_expert(selected, x.count, ffn.experts);
  const std::vector<Tile> tiles = make_tiles(groups, ffn.expert_size, ffn.neurons);
  if (tiles.empty()) return;

  const Scratch hidden = machine.scratch(tiles.back().start + tiles.back().size());
  machine.parallel.for_each(tiles.size(), [&](size_t task) {
    const Tile& tile = tiles[task];
    const Scratch gate = machine.scratch(ffn.w_gate == nullptr ? 0 : tile.size());
    const Tokens<const float> members{x.values, x.stride, tile.members, tile.member_count};
    compute_hidden(ffn, machine, tile.rows, members, hidden.get() + tile.start, gate.get());
  });

  const int64_t share = (stride / kMinStrips + kPanel - 1) / kPanel * kPanel;
  const int64_t strip = std::clamp(share, kPanel, kMaxStrip);
  machine.parallel.for_each(static_cast<size_t>((stride + strip - 1) / strip), [&](size_t task) {
    const int64_t begin = static_cast<int64_t>(task) * strip;
    add_strip(ffn, machine.simd, tiles, hidden.get(), begin, std::min(begin + strip, stride), y, stride);
  });
}

#define LTE_INSTANTIATE(Element)                                                                                   \
  template void add_block(const Ffn<Element>&, const Machine&, const Selected&, const Tokens<const float>&, float*, \
                          int64_t);
LTE_INSTANTIATE(float)
LTE_INSTANTIATE(Half)
LTE_INSTANTIATE(BFloat16)
#undef LTE_INSTANTIATE

}  // namespace lte::cpu
