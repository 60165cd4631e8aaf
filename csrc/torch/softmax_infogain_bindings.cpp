#include <string>
#include <vector>

#include "../bindings.h"
#include "softmax_infogain.h"
#include "softmax_infogain_autograd.h"

namespace {

namespace py = pybind11;
using at::Tensor;
using lgd::OptionalTensor;
using lgd::RowArguments;

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

} // namespace

void lgd::bind_softmax_infogain(py::module_& m) {
  m.def("softmax_infogain", &::softmax_infogain);
  m.def("softmax_infogain_reduced", &::softmax_infogain_reduced);
  m.def("softmax_infogain_reduced_with_node", &::softmax_infogain_reduced_with_node);
  m.def("softmax_infogain_mean", &::softmax_infogain_mean);
  m.def("set_backward_of_reduced", &lgd::set_backward_of_reduced);
  m.def("softmax_infogain_backward", &::softmax_infogain_backward);
  m.def("softmax_infogain_backward_", &::softmax_infogain_backward_);
  m.def("softmax_infogain_double_backward", &::softmax_infogain_double_backward);
  m.def("softmax_infogain_backward_matrix", &::softmax_infogain_backward_matrix);
  m.def("count_labels", &lgd::count_labels);
}
