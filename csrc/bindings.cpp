// The Python module `_C`: plain functions with the signatures of lgd_kernels/reference, and facts about the build.

#include <torch/extension.h>

#include <string>
#include <vector>

#include "torch/decoupled_linear.h"
#include "torch/decoupled_step.h"
#include "torch/local_residual.h"
#include "torch/softmax_infogain.h"
#include "torch/softmax_infogain_autograd.h"

namespace {

using at::Tensor;
using lgd::OptionalTensor;
using lgd::RowArguments;

#define LGD_H_PARAMETERS                                                                          \
  const OptionalTensor &matrix, const OptionalTensor &background, const OptionalTensor &diagonal, \
      const OptionalTensor &crow, const OptionalTensor &col, const OptionalTensor &values
#define LGD_ROW_PARAMETERS \
  const Tensor &logits, const Tensor &labels, LGD_H_PARAMETERS, int64_t ignore_index, double z_loss
#define LGD_ROW_ARGUMENTS                                                                   \
  RowArguments {                                                                            \
    logits, labels, {matrix, background, diagonal, crow, col, values}, ignore_index, z_loss \
  }

auto softmax_infogain(LGD_ROW_PARAMETERS, const OptionalTensor& row_scale, bool need_lse, bool need_norm) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain(LGD_ROW_ARGUMENTS, row_scale, need_lse, need_norm);
}

auto softmax_infogain_reduced(
    LGD_ROW_PARAMETERS, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain_reduced(LGD_ROW_ARGUMENTS, sample_weight, divisor, need_grad);
}

auto softmax_infogain_reduced_with_node(
    LGD_ROW_PARAMETERS, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad,
    const std::vector<int64_t>& shape) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain_reduced_with_node(LGD_ROW_ARGUMENTS, sample_weight, divisor, need_grad, shape);
}

auto softmax_infogain_mean(
    const Tensor& logits, const Tensor& labels, LGD_H_PARAMETERS, std::optional<int64_t> num_classes,
    int64_t ignore_index) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain_mean(
      logits, labels, {matrix, background, diagonal, crow, col, values}, num_classes, ignore_index);
}

auto softmax_infogain_backward(LGD_ROW_PARAMETERS, const Tensor& grad_loss, const OptionalTensor& grad_lse) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain_backward(LGD_ROW_ARGUMENTS, grad_loss, grad_lse);
}

void softmax_infogain_backward_(
    const Tensor& grad, const Tensor& row_scale, LGD_ROW_PARAMETERS, const Tensor& grad_loss,
    const OptionalTensor& grad_lse) {
  py::gil_scoped_release release;
  lgd::softmax_infogain_backward_(grad, row_scale, LGD_ROW_ARGUMENTS, grad_loss, grad_lse);
}

auto softmax_infogain_double_backward(
    LGD_ROW_PARAMETERS, const Tensor& grad_loss, const OptionalTensor& grad_lse, const Tensor& grad_grad) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain_double_backward(LGD_ROW_ARGUMENTS, grad_loss, grad_lse, grad_grad);
}

auto softmax_infogain_backward_matrix(
    const Tensor& logits, const Tensor& labels, int64_t n_rows, int64_t ignore_index, const Tensor& grad_loss) {
  py::gil_scoped_release release;
  return lgd::softmax_infogain_backward_matrix({logits, labels, {}, ignore_index, 0.0}, n_rows, grad_loss);
}

auto decoupled_step_(
    const Tensor& x, const lgd::TensorList& z, const lgd::TensorList& multiplier, const lgd::TensorList& velocity,
    const lgd::TensorList& residual, const lgd::TensorList& weight, const lgd::TensorList& weight_first,
    const lgd::TensorList& weight_second, const lgd::TensorList& bias, const lgd::TensorList& bias_first,
    const lgd::TensorList& bias_second, const Tensor& target, LGD_H_PARAMETERS, int64_t ignore_index,
    bool squared_error, const std::vector<int64_t>& activation, bool preactivation, int64_t hidden_loss, double kappa,
    const std::vector<double>& rho, const std::vector<double>& skip, const std::vector<double>& branch_scale,
    int64_t steps, double step_size, double z_momentum, double dual_step, int64_t update_rule,
    const std::vector<double>& update_numbers) {
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

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability", [] { return std::string(lgd::name_of(lgd::cpu_capability())); });
  m.def("built_capabilities", [] { return std::vector<std::string>{"DEFAULT", "AVX2", "AVX512"}; });
  m.def("compiler", [] { return std::string("g++ ") + __VERSION__; });
  m.def("softmax_infogain", &softmax_infogain);
  m.def("softmax_infogain_reduced", &softmax_infogain_reduced);
  m.def("softmax_infogain_reduced_with_node", &softmax_infogain_reduced_with_node);
  m.def("softmax_infogain_mean", &softmax_infogain_mean);
  m.def("set_backward_of_reduced", &lgd::set_backward_of_reduced);
  m.def("softmax_infogain_backward", &softmax_infogain_backward);
  m.def("softmax_infogain_backward_", &softmax_infogain_backward_);
  m.def("softmax_infogain_double_backward", &softmax_infogain_double_backward);
  m.def("softmax_infogain_backward_matrix", &softmax_infogain_backward_matrix);
  m.def("count_labels", &lgd::count_labels);
  m.def("local_residual", &lgd::local_residual, py::call_guard<py::gil_scoped_release>());
  m.def("decoupled_linear", &lgd::decoupled_linear, py::call_guard<py::gil_scoped_release>());
  m.def("decoupled_step_", &decoupled_step_);
  m.def("decoupled_linear_backward", &lgd::decoupled_linear_backward, py::call_guard<py::gil_scoped_release>());
}
