// The FFN on a CPU: score the experts of every token, compute the selected ones, skip the others.
//
//   y = (h * [sigmoid(x_router w_router^T + b_router) > threshold] per neuron) w_down + b_down
//   h = act(x w_gate^T + b_gate) * (x w_up^T + b_up), or act(x w_up^T + b_up) without w_gate
//
// Sums are taken in float32, in an order that depends on shapes and selected experts alone: any number of threads gives
// the same bits.
// Shapes: T tokens, D model width, F neurons, E experts, S neurons per expert (fewer in the last), C columns of what
// the router reads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../activation.h"
#include "../parallel.h"
#include "simd.h"

namespace lte::cpu {

template <typename Element>
struct Ffn {
  int64_t width;
  int64_t neurons;
  int64_t experts;
  int64_t router_width;  // C
  int64_t expert_size;
  Activation activation;
  float threshold;
  const Element* w_router;  // [E, C]
  const Element* b_router;  // [E] or null, as every bias
  const Element* w_up;      // [F, D]
  const Element* w_gate;    // [F, D], null when plain
  const Element* w_down;    // [F, D]
  const Element* b_up;      // [F]
  const Element* b_gate;    // [F]
  const Element* b_down;    // [D]
};

// Where scratch memory comes from; any thread may ask.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* take(size_t bytes) const = 0;
  virtual void give_back(void* memory) const = 0;
};

struct GivenBack {
  const Memory* memory;
  void operator()(float* values) const { memory->give_back(values); }
};
using Scratch = std::unique_ptr<float[], GivenBack>;

// How it runs: the loops of this processor, the threads of this session.
struct Machine {
  const Simd& simd;
  const Parallel& parallel;
  const Memory& memory;

  // Not set to zero first. Throws std::bad_alloc.
  Scratch scratch(int64_t count) const;
};

// x and y [T, D], router_x [T, C], which may be x; T may be 0, D may not. Throws std::bad_alloc.
template <typename Element>
void run(const Ffn<Element>& ffn, const Machine& machine, int64_t tokens, const Element* x, const Element* router_x,
         Element* y);

// Neurons [begin, end) of one expert.
struct Rows {
  int64_t begin;
  int64_t end;
  int64_t count() const { return end - begin; }
};

// Neurons computed together: their hidden values of a block of tokens stay in a level-1 cache.
inline constexpr int64_t kTileRows = 32;

// Appends the neurons of an expert, kTileRows at a time.
void append_tiles(int64_t expert, int64_t expert_size, int64_t neurons, std::vector<Rows>& tiles);

// The neurons of some experts, of which is_wanted has one value each; neighbours are one run, as memory is fastest at
// reading on.
std::vector<Rows> find_runs(const std::vector<char>& is_wanted, int64_t expert_size, int64_t neurons);

inline constexpr int64_t kLine = 64;  // bytes of a cache line

// The length of a part when `total` is cut into parts alike: a multiple of the panel, about `limit` at most.
int64_t even_share(int64_t total, int64_t limit);

// Columns of a panel that is multiplied: 192 x 32 floats of it leave room for others in a level-1 cache of 32 KiB.
inline constexpr int64_t kMaxPanelColumns = 192;

// Tokens turned into columns: panels of kPanel of them, [panels, width, kPanel], with zeros beyond the last.
class Columns {
 public:
  Columns(const Machine& machine, const Tokens<const float>& x, int64_t width);
  const float* panel(int64_t index, int64_t column) const { return values_.get() + (index * width_ + column) * kPanel; }
  int64_t panels() const { return panels_; }
  // Of a row of products, one for each token: an odd number of cache lines, so that rows do not share sets of a cache.
  int64_t stride() const { return panels_ * kPanel + kLine / static_cast<int64_t>(sizeof(float)); }

 private:
  int64_t width_;
  int64_t panels_;
  Scratch values_;
};

// products[r * x.stride() + t] = rows[r] . x[t] + bias[r]; as many rows at `next` are what is read after these.
template <typename Element>
void multiply_rows(const Machine& machine, const Element* rows, const Element* bias, int64_t count, int64_t width,
                   const Columns& x, const Element* next, float* products);

// 1 or 0 for every expert and token, [E, T].
using Selected = std::vector<char>;

// hidden[t * rows.count() + r] of a tile; `gate` is scratch of the same size.
template <typename Element>
void compute_hidden(const Ffn<Element>& ffn, const Machine& machine, Rows rows, const Tokens<const float>& x,
                    float* hidden, float* gate);

// y [D] += the output of one token without b_down. Reads every selected row once, in the order of memory.
template <typename Element>
void add_one_token(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const float* x, float* y);

// y [T, stride] += the outputs without b_down of a block of tokens: for each expert, small products of matrices with
// the tokens that selected it. Rows of y have room for whole panels.
template <typename Element>
void add_block(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const Tokens<const float>& x,
               float* y, int64_t stride);

// Whether so many tokens select so much that all experts at once take less time than one after the other.
bool is_mostly_selected(const Selected& selected, int64_t tokens, int64_t experts);

// y [T, D] of a block of tokens from dense products of all experts, of whose hidden values it drops the unselected.
template <typename Element>
void compute_masked(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const Columns& x,
                    int64_t tokens, Element* y);

}  // namespace lte::cpu
