// A libcuda.so.1 that runs nothing: it prints what is launched, with which arguments. An image is its own description,
// and the letters of its parameters, as text.
//
// FAKE_CAPABILITY is the device's (90); FAKE_REFUSED is an architecture whose images it does not take.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr int kSuccess = 0, kNoBinaryForGpu = 209, kNotFound = 500;

int number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

int capability() { return number("FAKE_CAPABILITY", 90); }

// The last word of the description.
int architecture(const char* image) { return std::atoi(std::strrchr(image, ' ') + 1); }

}  // namespace

extern "C" {

int cuCtxGetCurrent(void** context) {
  static int only;
  *context = &only;
  return kSuccess;
}

int cuCtxSetCurrent(void*) { return kSuccess; }

int cuStreamGetCtx(void*, void** context) { return cuCtxGetCurrent(context); }

int cuCtxGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 16 ? 132 : attribute == 75 ? capability() / 10 : capability() % 10;
  return kSuccess;
}

int cuModuleLoadData(const char** module, const char* image) {
  const int made_for = architecture(image);
  if (made_for == number("FAKE_REFUSED", -1) || capability() < 80) return kNoBinaryForGpu;
  *module = image;
  return kSuccess;
}

int cuModuleGetFunction(const char** function, const char* module, const char* name) {
  *function = module;
  return *name == '\0' ? kNotFound : kSuccess;
}

int cuFuncSetAttribute(const char*, int, int) { return kSuccess; }

int cuMemAlloc_v2(unsigned long long* address, size_t bytes) {
  std::printf("allocate %zu\n", bytes);
  *address = 1 << 20;
  return kSuccess;
}

int cuMemsetD8_v2(unsigned long long, unsigned char, size_t) { return kSuccess; }

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  void* stream;
  const void* attributes;
  unsigned attribute_count;
};

int cuLaunchKernelEx(const LaunchConfig* config, const char* function, void** arguments, void**) {
  std::printf("launch %s, grid %u %u, threads %u, attributes %u\n", function, config->grid[0], config->grid[1],
              config->block[0], config->attribute_count);
  for (const char* letter = function + std::strlen(function) + 1; *letter != '\0'; ++letter, ++arguments) {
    if (*letter == 'p') std::printf("argument %llu\n", *static_cast<unsigned long long*>(*arguments));
    if (*letter == 'i') std::printf("argument %d\n", *static_cast<int*>(*arguments));
    if (*letter == 'f') std::printf("argument %g\n", static_cast<double>(*static_cast<float*>(*arguments)));
  }
  return kSuccess;
}

int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_OF_THIS_TEST";
  return kSuccess;
}
}
