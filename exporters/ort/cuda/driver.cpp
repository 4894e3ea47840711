#include "driver.h"

#include <dlfcn.h>

#include <cstring>

namespace lte::cuda {

// Of cuda.h, as the structures below.
struct LaunchAttribute {
  int id;
  char padding[4];
  int value;
  char rest[60];
};

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  Stream* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};

namespace {

// Of cuda.h, whose numbers are part of the driver's interface.
constexpr int kSuccess = 0, kInvalidImage = 200, kNoBinaryForGpu = 209, kInvalidPtx = 218, kUnsupportedPtx = 222,
              kInvalidSource = 300;
constexpr int kMultiprocessors = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute
constexpr int kMaxDynamicShared = 8;                                                // CUfunction_attribute
constexpr int kProgrammaticStreamSerialization = 6;                                 // CUlaunchAttributeID

void* open_driver() {
  if (void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) return library;
  throw CudaError("there is no CUDA driver (libcuda.so.1) on this machine");
}

template <typename Pointer>
void find(void* library, const char* name, Pointer& function) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw CudaError(std::string("the CUDA driver has no ") + name + "; install a newer one");
  std::memcpy(&function, &found, sizeof function);
}

}  // namespace

Driver::Driver() {
  void* library = open_driver();
  find(library, "cuCtxGetCurrent", context_current_);
  find(library, "cuCtxSetCurrent", set_current_);
  find(library, "cuStreamGetCtx", stream_context_);
  find(library, "cuCtxGetDevice", current_device_);
  find(library, "cuDeviceGetAttribute", attribute_);
  find(library, "cuModuleLoadData", load_);
  find(library, "cuModuleGetFunction", function_);
  find(library, "cuFuncSetAttribute", function_attribute_);
  find(library, "cuMemAlloc_v2", allocate_);
  find(library, "cuMemsetD8_v2", fill_);
  find(library, "cuLaunchKernelEx", launch_);
  find(library, "cuGetErrorName", error_name_);
}

const Driver& Driver::get() {
  static const Driver driver;  // a constructor that throws is tried again by the next call
  return driver;
}

void Driver::check(int result, const char* what) const {
  if (result == kSuccess) return;
  const char* name = nullptr;
  if (error_name_(result, &name) != kSuccess || name == nullptr) name = "an unknown error";
  throw CudaError(std::string(what) + " failed: " + name + " (" + std::to_string(result) + ")");
}

Context* Driver::current_context() const {
  Context* context = nullptr;
  return context_current_(&context) == kSuccess ? context : nullptr;  // fails before CUDA is in use
}

Context* Driver::enter(Stream* stream) const {
  if (Context* context = current_context()) return context;
  Context* context = nullptr;
  check(stream_context_(stream, &context), "cuStreamGetCtx");
  check(set_current_(context), "cuCtxSetCurrent");
  return context;
}

int Driver::attribute(int number) const {
  int device = 0, value = 0;
  check(current_device_(&device), "cuCtxGetDevice");
  check(attribute_(&value, number, device), "cuDeviceGetAttribute");
  return value;
}

int Driver::multiprocessors() const { return attribute(kMultiprocessors); }

int Driver::capability() const { return 10 * attribute(kCapabilityMajor) + attribute(kCapabilityMinor); }

Module* Driver::try_load(const void* image) const {
  Module* module = nullptr;
  const int result = load_(&module, image);
  for (const int unfit : {kInvalidImage, kNoBinaryForGpu, kInvalidPtx, kUnsupportedPtx, kInvalidSource})
    if (result == unfit) return nullptr;
  check(result, "cuModuleLoadData");
  return module;
}

Function* Driver::function(Module* module, const char* name) const {
  Function* function = nullptr;
  check(function_(&function, module, name), "cuModuleGetFunction");
  return function;
}

void Driver::allow_shared(Function* function, unsigned bytes) const {
  check(function_attribute_(function, kMaxDynamicShared, static_cast<int>(bytes)), "cuFuncSetAttribute");
}

void* Driver::zeros(size_t bytes) const {
  Address address = 0;
  check(allocate_(&address, bytes), "cuMemAlloc");
  check(fill_(address, 0, bytes), "cuMemsetD8");
  void* pointer;
  static_assert(sizeof pointer == sizeof address);
  std::memcpy(&pointer, &address, sizeof pointer);
  return pointer;
}

void Driver::launch(Function* function, const Launch& launch, Stream* stream, void** arguments) const {
  LaunchAttribute dependent{};
  dependent.id = kProgrammaticStreamSerialization;
  dependent.value = 1;
  const LaunchConfig config{{launch.grid.x, launch.grid.y, 1}, {launch.threads, 1, 1}, launch.shared, stream,
                            &dependent,  launch.is_dependent ? 1u : 0u};
  check(launch_(&config, function, arguments, nullptr), "cuLaunchKernelEx");
}

}  // namespace lte::cuda
