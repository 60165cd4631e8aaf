#include "softmax_infogain_autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <utility>

namespace lgd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether nobody but autograd has a say in what happens to this tensor: no subclass, transform, lazy negation or
// device.
bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet ordinary(
      {c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return tensor.key_set() - ordinary == c10::DispatchKeySet(c10::DispatchKey::CPU);
}

bool is_plain_constant(const OptionalTensor& tensor) {
  return !tensor || (is_plain(*tensor) && !tensor->requires_grad());
}

pybind11::object& backward_in_python() {
  static auto* function = new pybind11::object; // never freed: Python is gone before static objects are
  return *function;
}

struct Arguments {
  const RowArguments& rows;
  const OptionalTensor& sample_weight;
  std::optional<double> divisor;
  const std::vector<int64_t>& shape;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> reduced(const Arguments& a, bool need_grad) {
  const at::AutoDispatchBelowADInplaceOrView no_graph;
  RowArguments rows = a.rows;
  rows.logits = rows.logits.reshape(a.shape);
  return softmax_infogain_reduced(rows, a.sample_weight, a.divisor, need_grad);
}

struct Reduced : torch::autograd::Function<Reduced> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const Arguments& a) {
    const auto [loss, scale, grad] = reduced(a, true);
    const auto& h = a.rows.h;
    const auto given = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    context->save_for_backward(
        {logits, a.rows.labels, given(h.matrix), given(h.background), given(h.diagonal), given(h.crow), given(h.col),
         given(h.values), given(a.sample_weight), scale, grad.reshape(logits.sizes())});
    context->saved_data["options"] = std::make_tuple(a.rows.ignore_index, a.rows.z_loss, a.shape);
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor& grad_loss = grads[0];
    variable_list saved = context->get_saved_variables();
    const bool last_use =
        !at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() && is_plain(grad_loss);
    if (last_use && grad_loss.item<double>() == 1) {
      return {std::move(saved.back()), at::Tensor()};
    }
    const pybind11::gil_scoped_acquire gil;
    const auto options = context->saved_data["options"].toTuple();
    const pybind11::tuple gradients = backward_in_python()(
        grad_loss, std::move(saved), options->elements()[0].toInt(), options->elements()[1].toDouble(),
        options->elements()[2].toIntVector());
    return {gradients[0].cast<at::Tensor>(), at::Tensor()};
  }
};

} // namespace

void set_backward_of_reduced(pybind11::object backward) {
  backward_in_python() = std::move(backward);
}

OptionalTensor softmax_infogain_reduced_with_node(
    const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad,
    const std::vector<int64_t>& shape) {
  const InfogainTensors& h = rows.h;
  for (const OptionalTensor& part : {h.matrix, h.background, h.diagonal, h.crow, h.col, h.values, sample_weight}) {
    if (!is_plain_constant(part)) {
      return std::nullopt;
    }
  }
  if (!is_plain(rows.logits) || !is_plain(rows.labels)) {
    return std::nullopt;
  }
  const Arguments arguments{rows, sample_weight, divisor, shape};
  return need_grad ? Reduced::apply(rows.logits, arguments) : std::get<0>(reduced(arguments, false));
}

} // namespace lgd
