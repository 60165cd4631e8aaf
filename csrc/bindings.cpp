// The Python module `_C`: plain functions with the signatures of lgd_kernels/reference, and facts about the build.

#include "bindings.h"

#include <optional>
#include <string>
#include <vector>

#include "torch/decoupled_step.h"

namespace {

namespace py = pybind11;
using at::Tensor;
using lgd::OptionalTensor;

auto decoupled_step_(
    const Tensor& x, const lgd::TensorList& z, const lgd::TensorList& multiplier, const lgd::TensorList& velocity,
    const lgd::TensorList& residual, const lgd::TensorList& weight, const lgd::TensorList& weight_first,
    const lgd::TensorList& weight_second, const lgd::TensorList& bias, const lgd::TensorList& bias_first,
    const lgd::TensorList& bias_second, const Tensor& target, LGD_H_PARAMETERS, int64_t ignore_index,
    bool squared_error, const std::vector<int64_t>& activation, bool preactivation, int64_t hidden_loss, double kappa,
    const std::vector<double>& rho, const std::vector<double>& skip, const std::vector<double>& branch_scale,
    int64_t steps, double step_size, double z_momentum, double dual_step, int64_t update_rule,
    const at::Tensor& update_numbers) {
  py::gil_scoped_release release;
  return lgd::decoupled_step_(
      {x,
       z,
       multiplier,
       velocity,
       residual,
       weight,
       weight_first,
       weight_second,
       bias,
       bias_first,
       bias_second,
       target,
       {matrix, background, diagonal, crow, col, values},
       ignore_index,
       squared_error,
       activation,
       preactivation,
       hidden_loss,
       kappa,
       rho,
       skip,
       branch_scale,
       steps,
       step_size,
       z_momentum,
       dual_step,
       update_rule,
       update_numbers});
}

// The CUDA version, 13000 for 13.0, that the kernels for CUDA devices were built with; none if they were not built.
std::optional<int> cuda_version() {
#ifdef LGD_WITH_CUDA
  return LGD_WITH_CUDA;
#else
  return std::nullopt;
#endif
}

// The functions of this module that take tensors on CUDA devices too.
std::vector<std::string> cuda_ops() {
  if (!cuda_version()) {
    return {};
  }
  return {
      "softmax_infogain",
      "softmax_infogain_reduced",
      "softmax_infogain_backward",
      "softmax_infogain_backward_",
      "softmax_infogain_double_backward",
      "softmax_infogain_backward_matrix",
      "count_labels",
      "local_residual",
      "decoupled_linear",
      "decoupled_linear_backward"};
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability", [] { return std::string(lgd::name_of(lgd::cpu_capability())); });
  m.def("built_capabilities", [] { return std::vector<std::string>{"DEFAULT", "AVX2", "AVX512"}; });
  m.def("compiler", [] { return std::string("g++ ") + __VERSION__; });
  m.def("cuda_version", &cuda_version);
  m.def("cuda_ops", &cuda_ops);
  lgd::bind_softmax_infogain(m);
  lgd::bind_layers(m);
  m.def("decoupled_step_", &decoupled_step_);
}
