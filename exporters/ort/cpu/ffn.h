// The FFN on a CPU: score the experts of every token, compute the selected ones, skip the others.
//
//   y = (h * [sigmoid(x_router w_router^T + b_router) > threshold] per neuron) w_down + b_down
//   h = act(x w_gate^T + b_gate) * (x w_up^T + b_up), or act(x w_up^T + b_up) without w_gate
//
// Sums are taken in float32, in an order that depends on the shapes alone: any number of threads gives the same bits.
// Shapes: T tokens, D model width, F neurons, E experts, S neurons per expert (fewer in the last), C columns of what the
// router reads.
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

// How it runs: the loops of this processor, the threads of this session.
struct Machine {
  const Simd& simd;
  const Parallel& parallel;
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

// 1 or 0 for every token and expert, [T, E].
using Selected = std::vector<char>;

// hidden[t * rows.count() + r] of a tile; `gate` is scratch of the same size.
template <typename Element>
void compute_hidden(const Ffn<Element>& ffn, const Simd& simd, Rows rows, const Tokens<const float>& x, float* hidden,
                    float* gate);

// y [D] += the output of one token without b_down. Reads every selected row once, in the order of memory.
template <typename Element>
void add_one_token(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const float* x, float* y);

// y [T, stride] += the outputs without b_down of a block of tokens: for each expert, small products of matrices with
// the tokens that selected it. Rows of y have room for whole panels.
template <typename Element>
void add_block(const Ffn<Element>& ffn, const Machine& machine, const Selected& selected, const Tokens<const float>& x,
               float* y, int64_t stride);

// Memory that is not set to zero first.
inline std::unique_ptr<float[]> scratch(int64_t count) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]);
}

}  // namespace lte::cpu
