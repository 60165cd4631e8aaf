#include "common.h"

#include <ATen/Functions.h>
#include <ATen/Version.h>

#include <cstdint>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lgd {

CpuCapability cpu_capability() {
  static const CpuCapability capability = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? CpuCapability::AVX512 : name == "AVX2" ? CpuCapability::AVX2 : CpuCapability::Default;
  }();
  return capability;
}

const char* name_of(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::AVX512:
      return "AVX512";
    case CpuCapability::AVX2:
      return "AVX2";
    case CpuCapability::Default:
      break;
  }
  return "DEFAULT";
}

at::Tensor empty_on_huge_pages(const at::Tensor& like) {
  at::Tensor result = at::empty_like(like);
#ifdef __linux__
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr uintptr_t kWorthwhile = 4 * kHugePage;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.data_ptr()), end = begin + result.nbytes();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (result.nbytes() >= kWorthwhile && first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE); // advice: failure changes nothing
  }
#endif
  return result;
}

} // namespace lgd
