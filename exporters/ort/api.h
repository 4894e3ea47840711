// ONNX Runtime's functions as methods that throw, and the way back: exceptions as an OrtStatus.
#pragma once

#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"

namespace lte {

// What the model or its inputs got wrong; becomes ORT_INVALID_ARGUMENT.
class BadInput : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Api {
 public:
  explicit Api(const abi::OrtApi* table) : table_(table) {}

  abi::OrtStatus* status(abi::OrtErrorCode code, const char* message) const noexcept {
    return at<abi::OrtStatus*(int, const char*)>(abi::Slot::CreateStatus)(code, message);
  }

  abi::OrtCustomOpDomain* create_domain(const char* name) const;
  void add_op(abi::OrtCustomOpDomain* domain, const abi::OrtCustomOp* op) const;
  void add_domain(abi::OrtSessionOptions* options, abi::OrtCustomOpDomain* domain) const;

  // Attributes and the name of a node. An attribute that is missing or of another type is a BadInput.
  std::string node_name(const abi::OrtKernelInfo* info) const;
  float float_attribute(const abi::OrtKernelInfo* info, const char* name) const;
  int64_t int_attribute(const abi::OrtKernelInfo* info, const char* name) const;
  std::string string_attribute(const abi::OrtKernelInfo* info, const char* name) const;

  size_t input_count(const abi::OrtKernelContext* context) const;
  // Null for an optional input that is not given.
  const abi::OrtValue* input(const abi::OrtKernelContext* context, size_t index) const;
  abi::OrtValue* output(abi::OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims) const;
  std::vector<int64_t> dims(const abi::OrtValue* value) const;
  void* data(const abi::OrtValue* value) const;

  // Calls task(data, i) for every i below count on the session's threads; returns when all are done.
  void parallel_for(const abi::OrtKernelContext* context, void (*task)(void*, size_t), size_t count, void* data) const;

  // Of the memory that a node's provider computes in; the caller releases it.
  abi::OrtAllocator* allocator(const abi::OrtKernelInfo* info) const;
  void release_allocator(abi::OrtAllocator* allocator) const noexcept;
  // The CUDA stream of a call, null where the provider has none.
  void* stream(const abi::OrtKernelContext* context) const;
  // Memory for free(), which a call may give back while its work is still on the stream.
  void* allocate(const abi::OrtKernelContext* context, abi::OrtAllocator* allocator, size_t bytes) const;
  void free(abi::OrtAllocator* allocator, void* memory) const noexcept;

 private:
  template <typename Function>
  Function* at(abi::Slot slot) const {
    Function* function;
    std::memcpy(&function, table_ + static_cast<size_t>(slot), sizeof function);
    return function;
  }
  template <typename Function, typename... Arguments>
  void call(abi::Slot slot, Arguments... arguments) const;
  template <typename Value>
  Value attribute(abi::Slot slot, const abi::OrtKernelInfo* info, const char* name, const char* kind) const;
  bool failed(abi::OrtStatus* status) const;

  const abi::OrtApi* table_;
};

// Runs work() and turns whatever it throws into a status: no exception may cross the C interface. `where` begins the
// message and outlives the call.
template <typename Work>
abi::OrtStatus* guarded(const Api& api, const std::string& where, Work&& work) noexcept {
  try {
    try {
      std::forward<Work>(work)();
      return nullptr;
    } catch (const BadInput& error) {
      return api.status(abi::ORT_INVALID_ARGUMENT, (where + error.what()).c_str());
    } catch (const std::exception& error) {
      return api.status(abi::ORT_FAIL, (where + error.what()).c_str());
    }
  } catch (...) {  // no memory for the message either
    return api.status(abi::ORT_FAIL, where.c_str());
  }
}

}  // namespace lte
