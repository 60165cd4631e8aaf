#include "compiled_for.h"

#include <cuda_runtime.h>

namespace lgd::gpu {
namespace {

__global__ void any_kernel() {}

} // namespace

int compiled_for() {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, any_kernel) != cudaSuccess) {
    cudaGetLastError(); // or the next kernel would be blamed for it
    return 0;
  }
  return attributes.ptxVersion;
}

} // namespace lgd::gpu
