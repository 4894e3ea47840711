// The inner loops, compiled once per instruction set and chosen when the library is loaded.
//
// Every pointer may be unaligned; every count may be 0 and need not be a multiple of a vector.
#pragma once

#include <cstdint>

#include "../activation.h"
#include "../element.h"

namespace lte::cpu {

// Rows of weights multiplied at once: enough independent sums to keep the arithmetic units busy, few enough that rows
// 16 KiB apart (4096 floats) share a set of a level-1 cache of eight ways.
inline constexpr int64_t kRows = 4;

// Columns of a panel: two vectors of the widest instruction set.
inline constexpr int64_t kPanel = 32;

// Tokens multiplied at once, where the processor has registers for their sums.
inline constexpr int64_t kGroup = 12;

// Some rows of a matrix of activations: row i is values[members[i] * stride] for i below count; all of its first rows
// when there are no members.
template <typename Value>
struct Tokens {
  Value* values;
  int64_t stride;
  const int64_t* members;
  int64_t count;
  Value* operator[](int64_t i) const { return values + (members == nullptr ? i : members[i]) * stride; }
};

// Memory that will be read: asked for bit by bit while other things are multiplied. Never used, and may be anything.
// Each product of a few tokens with a panel asks for one address with each row of the panel.
struct Ahead {
  const char* first;
  int64_t step;      // from row to row of a panel, in bytes
  int64_t stride;    // from product to product
  int64_t products;  // that ask, of those to come
};

// `next` is an address that will be read after the rows; it is fetched, never used, and may be anything.
template <typename Element>
struct ElementLoops {
  // sums[t * stride + r] += x[t][0:width] . rows[r * row_stride][0:width]
  void (*add_dots)(const Tokens<const float>& x, const Element* rows, int64_t row_stride, int64_t row_count,
                   int64_t width, const Element* next, float* sums, int64_t stride);
  // y[0:width] += sum over r of scales[r] * rows[r * width][0:width]
  void (*add_rows)(const float* scales, const Element* rows, int64_t row_count, int64_t width, const Element* next,
                   float* y);
  // to[c * stride + r] = rows[r * row_stride + c], for kPanel rows, zeros from `row_count` on, and `width` columns
  void (*transpose)(const Element* rows, int64_t row_stride, int64_t row_count, int64_t width, float* to,
                    int64_t stride);
  // The columns [begin, end) of some rows as panels one after the other, with zeros from `width` on.
  void (*copy_panels)(const Element* rows, int64_t row_count, int64_t width, int64_t begin, int64_t end, float* panels);
  // to[i] = from[i]
  void (*widen)(const Element* from, int64_t count, float* to);
  // to[i] = from[i], rounded to nearest even
  void (*narrow)(const float* from, int64_t count, Element* to);
};

struct Simd {
  const char* name;
  ElementLoops<float> of_float;
  ElementLoops<Half> of_half;
  ElementLoops<BFloat16> of_bfloat16;
  // y[t][0:kPanel] += sum over r of scales[t][r] * panel[r][0:kPanel]
  void (*add_panel)(const Tokens<const float>& scales, const float* panel, int64_t rows, const Tokens<float>& y,
                    Ahead& ahead);
  // The same for up to kGroup tokens, where scales[t][r] is scales[r * kGroup + t].
  void (*add_group)(const float* scales, const float* panel, int64_t rows, const Tokens<float>& y, Ahead& ahead);
  // values[i] *= by[i]
  void (*multiply)(const float* by, float* values, int64_t count);
  // to[i / kGroup * stride + i % kGroup] = kept[i] != 0 ? values[i] : 0
  void (*keep)(const float* kept, const float* values, int64_t count, float* to, int64_t stride);
  // values[i] = activation(values[i])
  void (*activate)(Activation activation, float* values, int64_t count);

  template <typename Element>
  const ElementLoops<Element>& loops() const;
};

template <>
inline const ElementLoops<float>& Simd::loops() const {
  return of_float;
}
template <>
inline const ElementLoops<Half>& Simd::loops() const {
  return of_half;
}
template <>
inline const ElementLoops<BFloat16>& Simd::loops() const {
  return of_bfloat16;
}

// The widest set this processor has, or the one that LTE_ORT_SIMD names (portable, avx2, avx512).
// Throws std::runtime_error when that is unknown or the processor lacks it.
const Simd& select_simd();

namespace portable {
extern const Simd simd;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Simd simd;
}
namespace avx512 {
extern const Simd simd;
}
#endif

}  // namespace lte::cpu
