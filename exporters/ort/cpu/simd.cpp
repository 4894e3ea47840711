#include "simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lte::cpu {

namespace {

struct Candidate {
  const Simd* simd;
  bool is_supported;
};

}  // namespace

const Simd& select_simd() {
  const Candidate candidates[] = {
#if defined(__x86_64__)
      {&avx512::simd, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")},
      {&avx2::simd, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {&portable::simd, true},
  };
  const char* wanted = std::getenv("LTE_ORT_SIMD");
  std::string names;
  for (const Candidate& candidate : candidates) {
    if (!candidate.is_supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == candidate.simd->name) return *candidate.simd;
    names += (names.empty() ? "" : ", ") + std::string(candidate.simd->name);
  }
  throw std::runtime_error("LTE_ORT_SIMD is '" + std::string(wanted) + "'; this processor has " + names);
}

}  // namespace lte::cpu
