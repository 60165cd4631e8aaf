#include "common.h"

#include <ATen/Version.h>

#include <string>

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

} // namespace lgd
