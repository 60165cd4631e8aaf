// What the glue asks of CUDA itself; the only file of it that needs CUDA's headers is cuda_device.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

namespace lgd {

bool is_on_cuda(const at::Tensor& tensor);

// A launch on the device of a tensor, which is the current one as long as this lives, in its current stream.
class CudaLaunch {
 public:
  explicit CudaLaunch(const at::Tensor& tensor);

  int compute_capability() const { return compute_capability_; } // 90 for 9.0
  void* stream() const { return stream_; }

 private:
  c10::DeviceGuard guard_;
  int compute_capability_;
  void* stream_;
};

// Throws RuntimeError unless `status`, a cudaError_t, says that the kernel was started.
void check_launch(int status, const char* kernel);

} // namespace lgd
