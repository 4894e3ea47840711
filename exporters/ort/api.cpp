#include "api.h"

namespace lte {

using abi::OrtCustomOpDomain;
using abi::OrtKernelContext;
using abi::OrtKernelInfo;
using abi::OrtStatus;
using abi::OrtTensorTypeAndShapeInfo;
using abi::OrtValue;
using abi::Slot;

namespace {

// Releases the shape object that GetTensorTypeAndShape hands out.
class ShapeInfo {
 public:
  using Release = void(OrtTensorTypeAndShapeInfo*);
  ShapeInfo(OrtTensorTypeAndShapeInfo* info, Release* release) : info_(info), release_(release) {}
  ~ShapeInfo() { release_(info_); }
  ShapeInfo(const ShapeInfo&) = delete;
  ShapeInfo& operator=(const ShapeInfo&) = delete;

 private:
  OrtTensorTypeAndShapeInfo* info_;
  Release* release_;
};

}  // namespace

template <typename Function, typename... Arguments>
void Api::call(Slot slot, Arguments... arguments) const {
  OrtStatus* status = at<Function>(slot)(arguments...);
  if (status == nullptr) return;
  const std::string message = at<const char*(const OrtStatus*)>(Slot::GetErrorMessage)(status);
  at<void(OrtStatus*)>(Slot::ReleaseStatus)(status);
  throw std::runtime_error(message);
}

bool Api::failed(OrtStatus* status) const {
  if (status == nullptr) return false;
  at<void(OrtStatus*)>(Slot::ReleaseStatus)(status);
  return true;
}

OrtCustomOpDomain* Api::create_domain(const char* name) const {
  OrtCustomOpDomain* domain = nullptr;
  call<OrtStatus*(const char*, OrtCustomOpDomain**)>(Slot::CreateCustomOpDomain, name, &domain);
  return domain;
}

void Api::add_op(OrtCustomOpDomain* domain, const abi::OrtCustomOp* op) const {
  call<OrtStatus*(OrtCustomOpDomain*, const abi::OrtCustomOp*)>(Slot::CustomOpDomain_Add, domain, op);
}

void Api::add_domain(abi::OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
  call<OrtStatus*(abi::OrtSessionOptions*, OrtCustomOpDomain*)>(Slot::AddCustomOpDomain, options, domain);
}

std::string Api::node_name(const OrtKernelInfo* info) const {
  using Function = OrtStatus*(const OrtKernelInfo*, char*, size_t*);
  size_t size = 0;  // of the name and its terminating zero
  call<Function>(Slot::KernelInfo_GetNodeName, info, static_cast<char*>(nullptr), &size);
  std::string name(size, '\0');
  call<Function>(Slot::KernelInfo_GetNodeName, info, name.data(), &size);
  return name.c_str();
}

template <typename Value>
Value Api::attribute(Slot slot, const OrtKernelInfo* info, const char* name, const char* kind) const {
  Value value{};
  if (failed(at<OrtStatus*(const OrtKernelInfo*, const char*, Value*)>(slot)(info, name, &value)))
    throw BadInput(std::string("attribute '") + name + "' is missing or not " + kind);
  return value;
}

float Api::float_attribute(const OrtKernelInfo* info, const char* name) const {
  return attribute<float>(Slot::KernelInfoGetAttribute_float, info, name, "a float");
}

int64_t Api::int_attribute(const OrtKernelInfo* info, const char* name) const {
  return attribute<int64_t>(Slot::KernelInfoGetAttribute_int64, info, name, "an integer");
}

std::string Api::string_attribute(const OrtKernelInfo* info, const char* name) const {
  auto* get = at<OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>(Slot::KernelInfoGetAttribute_string);
  size_t size = 0;
  if (failed(get(info, name, nullptr, &size)))
    throw BadInput(std::string("attribute '") + name + "' is missing or not a string");
  std::string value(size, '\0');
  if (failed(get(info, name, value.data(), &size)))
    throw BadInput(std::string("attribute '") + name + "' is unreadable");
  return value.c_str();
}

size_t Api::input_count(const OrtKernelContext* context) const {
  size_t count = 0;
  call<OrtStatus*(const OrtKernelContext*, size_t*)>(Slot::KernelContext_GetInputCount, context, &count);
  return count;
}

const OrtValue* Api::input(const OrtKernelContext* context, size_t index) const {
  const OrtValue* value = nullptr;
  using Function = OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**);
  call<Function>(Slot::KernelContext_GetInput, context, index, &value);
  return value;
}

OrtValue* Api::output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims) const {
  OrtValue* value = nullptr;
  using Function = OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
  call<Function>(Slot::KernelContext_GetOutput, context, index, dims.data(), dims.size(), &value);
  return value;
}

std::vector<int64_t> Api::dims(const OrtValue* value) const {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  call<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(Slot::GetTensorTypeAndShape, value, &info);
  const ShapeInfo owner(info, at<ShapeInfo::Release>(Slot::ReleaseTensorTypeAndShapeInfo));
  size_t rank = 0;
  call<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(Slot::GetDimensionsCount, info, &rank);
  std::vector<int64_t> dims(rank);
  using Function = OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
  call<Function>(Slot::GetDimensions, info, dims.data(), rank);
  return dims;
}

void* Api::data(const OrtValue* value) const {
  void* data = nullptr;
  call<OrtStatus*(const OrtValue*, void**)>(Slot::GetTensorMutableData, value, &data);
  return data;
}

abi::OrtAllocator* Api::allocator(const OrtKernelInfo* info) const {
  abi::OrtAllocator* allocator = nullptr;
  using Function = OrtStatus*(const OrtKernelInfo*, abi::OrtMemType, abi::OrtAllocator**);
  call<Function>(Slot::KernelInfoGetAllocator, info, abi::OrtMemTypeDefault, &allocator);
  return allocator;
}

void Api::release_allocator(abi::OrtAllocator* allocator) const noexcept {
  at<void(abi::OrtAllocator*)>(Slot::ReleaseAllocator)(allocator);
}

void* Api::stream(const OrtKernelContext* context) const {
  void* stream = nullptr;
  call<OrtStatus*(const OrtKernelContext*, void**)>(Slot::KernelContext_GetGPUComputeStream, context, &stream);
  return stream;
}

void* Api::allocate(const OrtKernelContext* context, abi::OrtAllocator* allocator, size_t bytes) const {
  void* memory = nullptr;
  if (stream(context) == nullptr) {
    call<OrtStatus*(abi::OrtAllocator*, size_t, void**)>(Slot::AllocatorAlloc, allocator, bytes, &memory);
    return memory;
  }
  const abi::OrtMemoryInfo* info = nullptr;
  using GetInfo = OrtStatus*(const abi::OrtAllocator*, const abi::OrtMemoryInfo**);
  call<GetInfo>(Slot::AllocatorGetInfo, allocator, &info);
  // Unlike AllocatorAlloc, it marks the memory as the stream's: another stream gets it when this one is through.
  using Function = OrtStatus*(const OrtKernelContext*, const abi::OrtMemoryInfo*, size_t, void**);
  call<Function>(Slot::KernelContext_GetScratchBuffer, context, info, bytes, &memory);
  return memory;
}

void Api::free(abi::OrtAllocator* allocator, void* memory) const noexcept {
  failed(at<OrtStatus*(abi::OrtAllocator*, void*)>(Slot::AllocatorFree)(allocator, memory));
}

void Api::parallel_for(const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, void* data) const {
  using Function = OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
  // As many batches as tasks: threads then fetch one task after the other instead of equal shares in advance.
  call<Function>(Slot::KernelContext_ParallelFor, context, task, count, count, data);
}

}  // namespace lte
