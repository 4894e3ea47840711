// The CUDA driver's functions that this library uses, found at run time: it is built without CUDA and loads where there
// is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lte::cuda {

struct Context;
struct Module;
struct Function;
struct Stream;
struct LaunchConfig;
using Address = uint64_t;  // of device memory, as the driver has it

// The driver is missing or refused; says what it said.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Grid {
  unsigned x;
  unsigned y;
};

struct Launch {
  Grid grid;
  unsigned threads;
  unsigned shared;
  bool is_dependent;  // may start before the launch before has ended
};

class Driver {
 public:
  // Opens libcuda.so.1 once. Throws CudaError where there is none, or one without these functions.
  static const Driver& get();

  Context* current_context() const;  // null where the calling thread has none
  // The context of the calling thread, or else that of the stream, which is made the thread's.
  Context* enter(Stream* stream) const;
  int multiprocessors() const;  // of the current context's device
  int capability() const;       // of the current context's device: 10 x major + minor
  // Null where the image does not fit the device; throws CudaError for every other failure.
  Module* try_load(const void* image) const;
  Function* function(Module* module, const char* name) const;
  void allow_shared(Function* function, unsigned bytes) const;
  void* zeros(size_t bytes) const;  // device memory that is never freed
  void launch(Function* function, const Launch& launch, Stream* stream, void** arguments) const;

 private:
  Driver();
  int attribute(int number) const;
  void check(int result, const char* what) const;

  int (*context_current_)(Context**);
  int (*set_current_)(Context*);
  int (*stream_context_)(Stream*, Context**);
  int (*current_device_)(int*);
  int (*attribute_)(int*, int, int);
  int (*load_)(Module**, const void*);
  int (*function_)(Function**, Module*, const char*);
  int (*function_attribute_)(Function*, int, int);
  int (*allocate_)(Address*, size_t);
  int (*fill_)(Address, unsigned char, size_t);
  int (*launch_)(const LaunchConfig*, Function*, void**, void**);
  int (*error_name_)(int, const char**);
};

}  // namespace lte::cuda
