#include "blas.h"

#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace lte::cuda {

namespace {

// Of cublas_api.h.
constexpr int kNotTransposed = 0, kTransposed = 1, kComputeFloat = 68, kDefaultAlgorithm = -1;

constexpr const char* kLibraries[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"};

struct Handle;

struct Blas {
  int (*create)(Handle**) = nullptr;
  int (*set_stream)(Handle*, Stream*) = nullptr;
  int (*gemm)(Handle*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*,
              void*, int, int, int, int) = nullptr;
};

template <typename Pointer>
bool find(void* library, const char* name, Pointer& function) {
  void* found = dlsym(library, name);
  std::memcpy(&function, &found, sizeof function);
  return found != nullptr;
}

// A library that is loaded, whichever version, is the one that fits this process; RTLD_NOLOAD opens no other.
void* open_blas() {
  for (const int only_loaded : {RTLD_NOLOAD, 0})
    for (const char* name : kLibraries)
      if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL | only_loaded)) return library;
  return nullptr;
}

// All of it, or an empty one.
Blas load_blas() {
  Blas blas;
  void* library = open_blas();
  const bool is_whole = library && find(library, "cublasCreate_v2", blas.create) &&
                        find(library, "cublasSetStream_v2", blas.set_stream) &&
                        find(library, "cublasGemmEx", blas.gemm);
  return is_whole ? blas : Blas{};
}

const Blas& blas() {
  static const Blas functions = load_blas();
  return functions;
}

void check(int status, const char* what) {
  if (status != 0) throw CudaError(std::string(what) + " failed with status " + std::to_string(status));
}

// A handle belongs to one stream, whose calls ONNX Runtime makes one after the other.
Handle* handle_of(Stream* stream) {
  static std::mutex mutex;
  static auto& handles = *new std::map<std::pair<Context*, Stream*>, Handle*>;
  const std::lock_guard<std::mutex> lock(mutex);
  Handle*& handle = handles[{Driver::get().current_context(), stream}];
  if (handle == nullptr) {
    check(blas().create(&handle), "cublasCreate");
    check(blas().set_stream(handle, stream), "cublasSetStream");
  }
  return handle;
}

}  // namespace

bool has_blas() { return blas().gemm != nullptr; }

void multiply(Stream* stream, const Product& product) {
  // cuBLAS counts columns first: the transposed result is the product of the transposed operands, in reverse order.
  const int m = static_cast<int>(product.columns), n = static_cast<int>(product.rows);
  const int k = static_cast<int>(product.inner), type = static_cast<int>(product.type);
  const float one = 1.0f;
  check(blas().gemm(handle_of(stream), product.is_right_transposed ? kTransposed : kNotTransposed, kNotTransposed, m, n,
                    k, &one, product.right, type, product.is_right_transposed ? k : m, product.left, type, k,
                    &product.scale, product.result, static_cast<int>(product.result_type), m, kComputeFloat,
                    kDefaultAlgorithm),
        "cublasGemmEx");
}

}  // namespace lte::cuda
