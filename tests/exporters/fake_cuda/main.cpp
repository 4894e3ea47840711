// Calls of exporters/ort/cuda with memory that is not there.
//
//   main run TYPE GATED TOKENS D F E S SHIFT [C]    TYPE 0 float32, 2 float16, 14 bfloat16; SHIFT of x, in bytes; the
//                                                   router reads x, or C columns of another tensor
//   main multiply ROWS COLUMNS INNER TRANSPOSED    on the host; fails unless the product is right
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "cuda/ffn.h"

namespace {

using namespace lte::cuda;

void* address(long number) {
  void* pointer;
  std::memcpy(&pointer, &number, sizeof pointer);
  return pointer;
}

class Nowhere : public Scratch {
 public:
  void* take(size_t bytes) override {
    std::printf("scratch %zu\n", bytes);
    return address(1 << 30);
  }
};

void run_ffn(const long* n) {
  const auto type = static_cast<DataType>(n[0]);
  const bool gated = n[1] != 0;
  const auto size = [&](int index) { return static_cast<int32_t>(n[index]); };
  const auto tensor = [](long number) { return address((1L << 24) + 256 * number); };  // in the order of node.h
  zeros(static_cast<size_t>(4 * n[4]));
  const int32_t router_width = n[8] == 0 ? size(3) : size(8);
  const Ffn ffn{type,      size(3),   size(4),   size(5),   router_width, size(6), lte::Activation::kSilu,
                0.5f,      tensor(1), tensor(2), tensor(3), gated ? tensor(4) : nullptr,
                tensor(5), tensor(6), gated ? tensor(7) : nullptr,        tensor(8), n[7] == 0};
  const Kernels kernels = load_kernels(type, gated);
  Nowhere scratch;
  void* x = address((1 << 25) + n[7]);
  run({ffn, kernels, nullptr, scratch}, n[2], {x, n[8] == 0 ? x : address(1 << 27), address(1 << 26)});
}

bool is_right(const long* n) {
  const size_t rows = static_cast<size_t>(n[0]), columns = static_cast<size_t>(n[1]), inner = static_cast<size_t>(n[2]);
  const bool transposed = n[3] != 0;
  std::vector<float> left(rows * inner), right(inner * columns), result(rows * columns, 1.0f);
  for (size_t i = 0; i < left.size(); ++i) left[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < right.size(); ++i) right[i] = std::cos(static_cast<float>(i));
  multiply(nullptr, {n[0], n[1], n[2], left.data(), right.data(), transposed, result.data(), DataType::kFloat,
                     DataType::kFloat, 1.0f});
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < columns; ++j) {
      float wanted = 1.0f;
      for (size_t k = 0; k < inner; ++k)
        wanted += left[i * inner + k] * (transposed ? right[j * inner + k] : right[k * columns + j]);
      if (std::abs(result[i * columns + j] - wanted) > 1e-4f) return false;
    }
  return true;
}

}  // namespace

int main(int count, char** words) {
  long numbers[9] = {};
  for (int i = 2; i < count && i < 11; ++i) numbers[i - 2] = std::atol(words[i]);
  try {
    if (std::strcmp(words[1], "multiply") == 0) return is_right(numbers) ? 0 : 1;
    run_ffn(numbers);
    return 0;
  } catch (const std::exception& error) {
    std::printf("error %s\n", error.what());
    return 2;
  }
}
