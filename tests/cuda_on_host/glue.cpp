// The glue of a CUDA build as a Python module on this CPU: it takes the tensors of this CPU for those of a device,
// whose kernels are those of cuda_on_host.so. What the CPU's own kernels would do is not in it.

#include <string>

#include "../../csrc/bindings.h"
#include "../../csrc/cpu/decoupled_linear.h"
#include "../../csrc/cpu/local_residual.h"
#include "../../csrc/cpu/softmax_infogain.h"
#include "../../csrc/torch/cuda_device.h"

extern "C" { // harness.cpp
const char* take_failure();
void run_in_reverse(bool reverse);
}

namespace lgd {
namespace {
int pretended_capability = 90;
} // namespace

bool is_on_cuda(const at::Tensor&) {
  return true;
}

CudaLaunch::CudaLaunch(const at::Tensor& tensor)
    : guard_(tensor.device()), compute_capability_(pretended_capability), stream_(nullptr) {}

void check_launch(int status, const char* kernel) {
  const std::string failure = take_failure();
  TORCH_CHECK(status == 0 && failure.empty(), kernel, ": status ", status, " ", failure);
}

namespace {
[[noreturn]] void not_here() {
  TORCH_CHECK(false, "a CPU kernel was called for a tensor on a CUDA device");
}
} // namespace

#define LGD_NOT_HERE(CAPABILITY, Acc)                                                                      \
  void CAPABILITY::softmax_infogain(const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainOutput<Acc>&) { \
    not_here();                                                                                            \
  }                                                                                                        \
  void CAPABILITY::softmax_infogain_double_backward(                                                       \
      const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainDoubleBackward<Acc>&) {                       \
    not_here();                                                                                            \
  }                                                                                                        \
  void CAPABILITY::softmax_infogain_backward_matrix(                                                       \
      const SoftmaxInfogainInput<Acc>&, const SoftmaxInfogainBackwardMatrix<Acc>&) {                       \
    not_here();                                                                                            \
  }                                                                                                        \
  void CAPABILITY::local_residual(const LocalResidual<Acc>&) {                                             \
    not_here();                                                                                            \
  }                                                                                                        \
  void CAPABILITY::decoupled_linear(const DecoupledLinear<Acc>&) {                                         \
    not_here();                                                                                            \
  }                                                                                                        \
  void CAPABILITY::decoupled_linear_backward(const DecoupledLinearBackward<Acc>&) {                        \
    not_here();                                                                                            \
  }
LGD_NOT_HERE(DEFAULT, float)
LGD_NOT_HERE(DEFAULT, double)
LGD_NOT_HERE(AVX2, float)
LGD_NOT_HERE(AVX2, double)
LGD_NOT_HERE(AVX512, float)
LGD_NOT_HERE(AVX512, double)

} // namespace lgd

PYBIND11_MODULE(cuda_glue_on_host, m) {
  lgd::bind_softmax_infogain(m);
  lgd::bind_layers(m);
  m.def("set_compute_capability", [](int capability) { lgd::pretended_capability = capability; });
  m.def("run_in_reverse", &run_in_reverse);
}
