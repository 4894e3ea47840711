// The library's one exported function: ONNX Runtime calls it for every session that names the library.
#include <map>
#include <mutex>
#include <string>

#include "api.h"
#include "cpu/op.h"
#include "cpu/simd.h"
#ifdef LTE_CUDA
#include "cuda/op.h"
#endif

namespace lte {

namespace {

// The operators' domain. Sessions refer to it for as long as they live, so it is made once and never freed; a process
// may hold several copies of ONNX Runtime, each with a table of its own.
abi::OrtCustomOpDomain* domain_of(const abi::OrtApi* table) {
  static std::mutex mutex;
  static auto& domains = *new std::map<const abi::OrtApi*, abi::OrtCustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = domains.find(table); found != domains.end()) return found->second;
  const Api api(table);
  abi::OrtCustomOpDomain* domain = api.create_domain("lte");
  for (const abi::OrtCustomOp* op : cpu::operators()) api.add_op(domain, op);
#ifdef LTE_CUDA  // built with the kernels; ONNX Runtime without a CUDA provider takes no notice of the operators
  for (const abi::OrtCustomOp* op : cuda::operators()) api.add_op(domain, op);
#endif
  return domains[table] = domain;
}

abi::OrtStatus* too_old(const abi::OrtApiBase* base) {
  const Api first(base->GetApi(1));  // every release has it
  const std::string message =
      "liblte_ort.so needs ONNX Runtime 1.18 or later; this is " + std::string(base->GetVersionString());
  return first.status(abi::ORT_NOT_IMPLEMENTED, message.c_str());
}

}  // namespace

}  // namespace lte

extern "C" __attribute__((visibility("default"))) lte::abi::OrtStatus* RegisterCustomOps(
    lte::abi::OrtSessionOptions* options, const lte::abi::OrtApiBase* base) {
  const lte::abi::OrtApi* table = base->GetApi(lte::abi::kVersion);
  if (table == nullptr) return lte::too_old(base);
  const lte::Api api(table);
  return lte::guarded(api, "liblte_ort.so: ", [&] {
    lte::cpu::select_simd();  // so that a wrong choice is reported here, and not by the first node
    api.add_domain(options, lte::domain_of(table));
  });
}
