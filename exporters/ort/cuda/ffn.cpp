#include "ffn.h"

#include <string>

namespace lte::cuda {

namespace {

constexpr uintptr_t kVector = 16;

// Partial sums of a few tokens, [splits, T, D], are counted in 32 bits.
constexpr int32_t kMaxFewWidth = 1 << 20;

std::string name_of(DataType type) {
  if (type == DataType::kFloat) return "fp32";
  return type == DataType::kHalf ? "fp16" : "bf16";
}

// Tokens that the kernels for a few take at once.
int64_t max_few_tokens(DataType type) { return type == DataType::kFloat ? kTokensFloat : kTokensLarge; }

Kernels::One load_one(const std::string& type, const std::string& kind, const std::string& width) {
  const auto down = [&](int experts) {
    return load_kernel("one.down/" + type + "/" + std::to_string(experts) + "/" + width);
  };
  return {load_kernel("one.up/" + type + "/" + kind + "/" + width), down(width == "wide" ? kListSmall : kListLarge),
          down(kListLarge)};
}

Kernels::Few load_few(const std::string& type, const std::string& kind, int64_t tokens) {
  const std::string count = std::to_string(tokens);
  const auto down = [&](int experts) {
    return load_kernel("few.down/" + type + "/" + count + "/" + std::to_string(experts));
  };
  return {load_kernel("few.scores/" + type + "/" + count),
          load_kernel("few.up/" + type + "/" + kind + "/" + count), down(kListSmall), down(kListLarge)};
}

Kernels::Large load_large(const std::string& type, const std::string& kind, int width) {
  if (type == "fp32") return {};
  const std::string size = std::to_string(width);
  const Kernel up = load_kernel("large.up/" + type + "/" + kind + "/" + size);
  const int warps = static_cast<int>(up.image->threads) / 32;
  return {load_kernel("large.scores/" + type + "/" + size), up, load_kernel("large.down/" + type),
          Driver::get().multiprocessors() * (kLargeUpWarps / warps)};
}

bool fits_few(const Ffn& ffn, int64_t tokens, const Values& values) {
  return tokens <= max_few_tokens(ffn.type) && ffn.width <= kMaxFewWidth && is_wide(ffn, values) &&
         ffn.neurons % 16 == 0 && ffn.expert_size % 16 == 0;
}

}  // namespace

Kernels load_kernels(DataType type, bool gated) {
  const std::string element = name_of(type), kind = gated ? "gated" : "plain";
  return {load_one(element, kind, "wide"),
          load_one(element, kind, "any"),
          load_kernel("one.down/" + element + "/" + std::to_string(kListSmall) + "/" + std::to_string(kPaperSize)),
          load_large(element, kind, kNarrow),
          load_large(element, kind, kMiddle),
          load_large(element, kind, kBroad),
          load_few(element, kind, kTokensSmall),
          load_few(element, kind, max_few_tokens(type)),
          load_kernel("prompt.mask/" + element + "/" + kind),
          load_kernel("prompt.fill/" + element)};
}

size_t element_bytes(DataType type) { return type == DataType::kFloat ? 4 : 2; }

bool is_wide(const Ffn& ffn, const Values& values) {
  uintptr_t bits = static_cast<uintptr_t>(ffn.width) | static_cast<uintptr_t>(ffn.router_width);
  for (const void* pointer : {values.x, values.router_x, static_cast<const void*>(values.y), ffn.w_router,
                              ffn.b_router, ffn.w_up, ffn.w_gate, ffn.w_down, ffn.b_up, ffn.b_gate, ffn.b_down})
    bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % kVector == 0;
}

Values from(const Ffn& ffn, const Values& values, int64_t first) {
  const int64_t bytes = first * static_cast<int64_t>(element_bytes(ffn.type));
  return {offset(values.x, bytes * ffn.width), offset(values.router_x, bytes * ffn.router_width),
          offset(values.y, bytes * ffn.width)};
}

void run(const Call& call, int64_t tokens, const Values& values) {
  const Ffn& ffn = call.ffn;
  const bool is_listable = 0 < ffn.experts && ffn.experts <= kListLarge;
  if (is_listable && tokens == 1 && fits_large(ffn, values)) return run_large_layer(call, values);
  if (is_listable && tokens == 1) return run_one_token(call, values);
  if (is_listable && fits_few(ffn, tokens, values)) return run_few_tokens(call, static_cast<int32_t>(tokens), values);
  if (has_blas() || ffn.experts == 0) return run_prompt(call, tokens, values);
  if (!is_listable)
    throw CudaError("more than " + std::to_string(kListLarge) + " experts need cuBLAS, which is not in this process");
  for (int64_t token = 0; token < tokens; ++token) run_one_token(call, from(ffn, values, token));
}

}  // namespace lte::cuda
