#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace lte::cuda {

namespace {

// From here on a kernel must ask for its shared memory.
constexpr unsigned kFreeShared = 48 * 1024;

// Biases that a model leaves out are this long at first.
constexpr size_t kZeroBytes = size_t{1} << 20;

struct Zeros {
  const void* memory;
  size_t bytes;
};

// What is loaded; a process keeps it, as other sessions of a context may use it.
struct Loaded {
  std::mutex mutex;
  std::map<std::pair<Context*, std::string>, Kernel> kernels;
  std::map<Context*, Zeros> zeros;
};

Loaded& loaded() {
  static auto& all = *new Loaded;
  return all;
}

// Code for 8.0 runs on 8.6 too, not on 9.0.
bool fits(const Image& image, int capability) {
  if (image.architecture == 0) return true;
  return image.architecture / 10 == capability / 10 && image.architecture <= capability;
}

Kernel load(const std::string& name) {
  const Driver& driver = Driver::get();
  const int capability = driver.capability();
  for (const Image* image = images().begin; image != images().end; ++image) {
    if (image->name != name || !fits(*image, capability)) continue;
    Module* module = driver.try_load(code(*image));
    if (module == nullptr) continue;  // an older driver than the machine code is for; it may take the PTX
    Function* function = driver.function(module, image->symbol);
    if (image->shared > kFreeShared) driver.allow_shared(function, image->shared);
    return {function, image};
  }
  throw CudaError("no kernel '" + name + "' for compute capability " + std::to_string(capability / 10) + "." +
                  std::to_string(capability % 10) + "; 8.0 is the least");
}

}  // namespace

Kernel load_kernel(const std::string& name) {
  Context* context = Driver::get().current_context();
  const std::lock_guard<std::mutex> lock(loaded().mutex);
  const auto key = std::make_pair(context, name);
  if (const auto found = loaded().kernels.find(key); found != loaded().kernels.end()) return found->second;
  return loaded().kernels[key] = load(name);
}

const void* zeros(size_t bytes) {
  Context* context = Driver::get().current_context();
  const std::lock_guard<std::mutex> lock(loaded().mutex);
  Zeros& kept = loaded().zeros[context];
  if (kept.bytes < bytes || kept.memory == nullptr) {  // the shorter one stays: captured graphs may read it
    const size_t wanted = std::max({bytes, 2 * kept.bytes, kZeroBytes});
    kept = {Driver::get().zeros(wanted), wanted};
  }
  return kept.memory;
}

void detail::check_parameters(const Image& image, const char* given) {
  if (std::strcmp(image.parameters, given) != 0)
    throw CudaError(std::string("kernel '") + image.name + "' takes " + image.parameters + ", not " + given);
}

}  // namespace lte::cuda
