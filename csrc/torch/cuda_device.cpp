#include "cuda_device.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "../cuda/compiled_for.h"

namespace lgd {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_launch(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Of the current device, as far as the kernels were compiled for it.
int usable_capability(c10::DeviceIndex device) {
  static std::array<std::atomic<int>, 128> known = {}; // 0: not yet
  std::atomic<int>& capability = known.at(device);
  if (capability == 0) {
    const int of_device = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                          attribute(cudaDevAttrComputeCapabilityMinor, device);
    capability = std::min(of_device, std::max(gpu::compiled_for(), 1));
  }
  return capability;
}

} // namespace

bool is_on_cuda(const at::Tensor& tensor) {
  return tensor.is_cuda();
}

CudaLaunch::CudaLaunch(const at::Tensor& tensor) : guard_(tensor.device()) {
  const c10::DeviceIndex device = tensor.device().index();
  compute_capability_ = usable_capability(device);
  stream_ = c10::cuda::getCurrentCUDAStream(device).stream();
}

void check_launch(int status, const char* kernel) {
  const auto error = static_cast<cudaError_t>(status);
  if (error != cudaSuccess) {
    cudaGetLastError(); // or the next kernel would be blamed for it
  }
  TORCH_CHECK(
      error == cudaSuccess, kernel, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
      error == cudaErrorNoKernelImageForDevice
          ? " (the CUDA kernels were built for other devices: set TORCH_CUDA_ARCH_LIST and install lgd_kernels again)"
          : "");
}

} // namespace lgd
