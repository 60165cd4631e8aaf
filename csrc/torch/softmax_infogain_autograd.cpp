#include "softmax_infogain_autograd.h"

#include <ATen/record_function.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <utility>

namespace lgd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether this tensor is memory of the CPU that autograd may follow: no transform, lazy negation, device, or subclass
// with a __torch_dispatch__. (The caller has asked for __torch_function__.)
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
  RECORD_FUNCTION("lgd_kernels::softmax_infogain_reduced", std::vector<c10::IValue>({a.rows.logits, a.rows.labels}));
  RowArguments rows = a.rows;
  rows.logits = rows.logits.reshape(a.shape);
  const auto [loss, scale, grad] = softmax_infogain_reduced(rows, a.sample_weight, a.divisor, need_grad);
  return {loss, scale, need_grad ? grad.reshape(a.rows.logits.sizes()) : grad};
}

struct Reduced : torch::autograd::Function<Reduced> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const Arguments& a) {
    const auto [loss, scale, grad] = reduced(a, true);
    const auto& h = a.rows.h;
    const auto given = [](const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); };
    context->save_for_backward(
        {logits, a.rows.labels, given(h.matrix), given(h.background), given(h.diagonal), given(h.crow), given(h.col),
         given(h.values), given(a.sample_weight), scale, grad});
    context->saved_data["options"] = // no list: compiled autograd could not hash it
        std::make_tuple(a.rows.ignore_index, a.rows.z_loss, a.shape[0], a.shape[1], a.shape[2]);
    context->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const at::Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) {
      return {at::Tensor(), at::Tensor()};
    }
    variable_list saved = context->get_saved_variables();
    if (is_last_use() && is_plain(grad_loss) && !grad_loss._fw_grad(0).defined() && grad_loss.item<double>() == 1) {
      return {std::move(saved.back()), at::Tensor()}; // one for each argument of forward
    }
    const pybind11::gil_scoped_acquire gil;
    const std::vector<c10::IValue> options = context->saved_data["options"].toTupleRef().elements().vec();
    const auto integer = [&](int i) { return options[i].toInt(); };
    const pybind11::tuple gradients = backward_in_python()(
        grad_loss, std::move(saved), integer(0), options[1].toDouble(),
        std::vector<int64_t>{integer(2), integer(3), integer(4)});
    return {gradients[0].cast<at::Tensor>(), at::Tensor()};
  }

 private:
  // Whether nobody else will read what was saved, and nobody records what is done with it.
  static bool is_last_use() {
    return !at::GradMode::is_enabled() && !torch::autograd::get_current_graph_task_keep_graph() &&
           !c10::impl::TorchDispatchModeTLS::any_modes_set();
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

OptionalTensor softmax_infogain_mean(
    const at::Tensor& logits, const at::Tensor& labels, const InfogainTensors& h, std::optional<int64_t> num_classes,
    int64_t ignore_index) {
  const auto is_supported = [](at::ScalarType dtype) {
    return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  };
  if (!is_plain(logits) || logits.dim() != 2 || !is_supported(logits.scalar_type()) || !is_plain(labels) ||
      labels.dim() != 1 || labels.scalar_type() != at::kLong || labels.size(0) != logits.size(0) ||
      num_classes.value_or(logits.size(1)) != logits.size(1)) {
    return std::nullopt;
  }
  const RowArguments rows{logits, labels.unsqueeze(1), h, ignore_index, 0.0};
  const bool need_grad = logits.requires_grad() && at::GradMode::is_enabled();
  return softmax_infogain_reduced_with_node(
      rows, std::nullopt, std::nullopt, need_grad, {logits.size(0), logits.size(1), 1});
}

} // namespace lgd
