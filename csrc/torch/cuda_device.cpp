#include "cuda_device.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace lgd {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_launch(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

} // namespace

bool is_on_cuda(const at::Tensor& tensor) {
  return tensor.is_cuda();
}

CudaLaunch::CudaLaunch(const at::Tensor& tensor) : guard_(tensor.device()) {
  const c10::DeviceIndex device = tensor.device().index();
  compute_capability_ =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  stream_ = c10::cuda::getCurrentCUDAStream(device).stream();
}

void check_launch(int status, const char* kernel) {
  const auto error = static_cast<cudaError_t>(status);
  TORCH_CHECK(
      error == cudaSuccess, kernel, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
      error == cudaErrorNoKernelImageForDevice
          ? " (the CUDA kernels were built for other devices: set TORCH_CUDA_ARCH_LIST and install lgd_kernels again)"
          : "");
}

} // namespace lgd
