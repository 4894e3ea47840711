// Running tasks on the session's threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>

#include "api.h"

namespace lte {

class Parallel {
 public:
  Parallel(const Api& api, const abi::OrtKernelContext* context) : api_(api), context_(context) {}

  // Calls task(i) for every i below count, in any order and on any thread; rethrows the first exception.
  template <typename Task>
  void for_each(size_t count, const Task& task) const {
    if (count == 1) return task(size_t{0});
    if (count == 0) return;
    Shared<Task> shared{task, {}, nullptr};
    api_.parallel_for(context_, &Shared<Task>::run, count, &shared);
    if (shared.error) std::rethrow_exception(shared.error);
  }

 private:
  template <typename Task>
  struct Shared {
    const Task& task;
    std::atomic<bool> has_failed;
    std::exception_ptr error;  // written once, by the task that set has_failed

    static void run(void* data, size_t index) {
      auto* shared = static_cast<Shared*>(data);
      try {
        shared->task(index);
      } catch (...) {
        if (!shared->has_failed.exchange(true)) shared->error = std::current_exception();
      }
    }
  };

  const Api& api_;
  const abi::OrtKernelContext* context_;
};

}  // namespace lte
