// softmax_infogain between tensors and kernels: conversions, allocation, and the choice of the instruction set.

#include "softmax_infogain.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

#include "../cpu/softmax_infogain.h"
#include "huge_pages.h"
#include "infogain.h"

namespace lgd {
namespace {

Rows rows_of(const at::Tensor& tensor, const char* name) {
  return {
      const_cast<void*>(tensor.const_data_ptr()), dtype_of_tensor(tensor, name), tensor.stride(0), tensor.stride(1),
      tensor.stride(2)};
}

template <typename T>
PerRow<T> per_row(const at::Tensor& tensor) {
  return {const_cast<T*>(tensor.const_data_ptr<std::remove_const_t<T>>()), tensor.stride(0), tensor.stride(1)};
}

// An input with one element for every row of the logits.
template <typename T>
PerRow<const T> row_input(const RowArguments& rows, const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 2 && tensor.size(0) == rows.logits.size(0) && tensor.size(1) == rows.logits.size(2), name,
      ": expected shape (", rows.logits.size(0), ", ", rows.logits.size(2), "), got ", tensor.sizes());
  return per_row<const T>(tensor);
}

template <typename T>
PerRow<const T> row_input(const RowArguments& rows, const OptionalTensor& tensor, const char* name) {
  return tensor ? row_input<T>(rows, *tensor, name) : PerRow<const T>{};
}

// A tensor in the shape of the logits.
Rows like_logits(const RowArguments& rows, const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(
      tensor.sizes() == rows.logits.sizes(), name, ": expected shape ", rows.logits.sizes(), ", got ", tensor.sizes());
  return rows_of(tensor, name);
}

// One call of a kernel: its input, and the check of the labels once it has run.
template <typename Acc>
class Call {
 public:
  Call(const RowArguments& rows) : classes_(rows.logits.size(1)), infogain_(rows.h, classes_), labels_(rows.labels) {
    TORCH_CHECK_VALUE(rows.logits.dim() == 3, "logits: expected shape (O, C, I), got ", rows.logits.sizes());
    TORCH_CHECK_VALUE(
        labels_.dim() == 2 && labels_.size(0) == rows.logits.size(0) && labels_.size(1) == rows.logits.size(2),
        "labels: expected shape (", rows.logits.size(0), ", ", rows.logits.size(2), "), got ", labels_.sizes());
    TORCH_CHECK_TYPE(labels_.scalar_type() == at::kLong, "labels: dtype must be int64, got ", labels_.scalar_type());
    input.outer = rows.logits.size(0);
    input.classes = classes_;
    input.inner = rows.logits.size(2);
    input.logits = rows_of(rows.logits, "logits");
    input.labels = per_row<const int64_t>(labels_);
    input.ignore_index = rows.ignore_index;
    input.infogain = infogain_.view;
    input.z_loss = rows.z_loss;
    input.first_bad_label = &first_bad_label_;
  }

  bool empty() const { return input.outer == 0 || input.inner == 0; }

  // Run a kernel on the input, unless there is none.
  template <typename Kernel>
  void run(const Kernel& kernel) {
    if (empty()) {
      return;
    }
    kernel();
    if (first_bad_label_ != std::numeric_limits<int64_t>::max()) {
      const int64_t value =
          labels_[first_bad_label_ / input.inner][first_bad_label_ % input.inner].template item<int64_t>();
      TORCH_CHECK_INDEX(
          false, "labels: value ", value, " at position ", first_bad_label_, " is out of range for ",
          input.infogain.n_rows, " classes");
    }
  }

  SoftmaxInfogainInput<Acc> input;

 private:
  int64_t classes_;
  Infogain<Acc> infogain_;
  at::Tensor labels_;
  int64_t first_bad_label_ = std::numeric_limits<int64_t>::max();
};

#define LGD_RUN(call, kernel, arguments) (call).run([&] { LGD_FOR_THIS_CPU(kernel, arguments) })

// Beyond this many bytes the gradient would not stay in the last-level cache anyway.
constexpr int64_t kStreamFrom = int64_t(16) << 20;

// Whether two per-row tensors agree everywhere: then a gradient made for one of them serves the other.
template <typename Acc>
bool agree(const at::Tensor& a, const at::Tensor& b) {
  const PerRow<const Acc> left = per_row<const Acc>(a), right = per_row<const Acc>(b);
  const auto steps = [](int64_t size, int64_t left_stride, int64_t right_stride) {
    return left_stride == 0 && right_stride == 0 ? std::min<int64_t>(size, 1) : size;
  };
  const int64_t outer = steps(a.size(0), left.outer_stride, right.outer_stride);
  const int64_t inner = steps(a.size(1), left.inner_stride, right.inner_stride);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      if (!(left.at(o, i) == right.at(o, i))) {
        return false;
      }
    }
  }
  return true;
}

constexpr int64_t kCountGrain = 32768; // labels for one thread: a few microseconds

int64_t count(const at::Tensor& labels, int64_t ignore_index) {
  const at::Tensor flat = labels.reshape({-1});
  TORCH_CHECK_TYPE(flat.scalar_type() == at::kLong, "labels: dtype must be int64, got ", flat.scalar_type());
  const int64_t* data = flat.const_data_ptr<int64_t>();
  const int64_t stride = flat.stride(0);
  const auto count_range = [=](int64_t begin, int64_t end, int64_t) {
    int64_t n = 0;
    if (stride == 1) { // a loop of its own, which the compiler vectorizes
      for (int64_t i = begin; i < end; ++i) {
        n += data[i] != ignore_index;
      }
      return n;
    }
    for (int64_t i = begin; i < end; ++i) {
      n += data[i * stride] != ignore_index;
    }
    return n;
  };
  return at::parallel_reduce(0, flat.numel(), kCountGrain, int64_t(0), count_range, std::plus<>());
}

template <typename Acc>
struct Kernels {
  static std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
      const RowArguments& rows, const OptionalTensor& row_scale, bool need_lse, bool need_norm) {
    Call<Acc> call(rows);
    const auto options = rows.logits.options().dtype(c10::CppTypeToScalarType<Acc>::value);
    const auto output = [&](bool needed) {
      return needed ? at::empty({call.input.outer, call.input.inner}, options) : at::empty({0}, options);
    };
    const at::Tensor loss = output(true), lse = output(need_lse), norm = output(need_norm);
    SoftmaxInfogainOutput<Acc> out;
    out.loss = per_row<Acc>(loss);
    if (need_lse) {
      out.lse = per_row<Acc>(lse);
    }
    if (need_norm) {
      out.norm = per_row<Acc>(norm);
    }
    at::Tensor grad = row_scale ? empty_on_huge_pages(rows.logits) : at::empty({0}, rows.logits.options());
    if (row_scale) {
      want_gradient(rows, out, grad, *row_scale, std::nullopt);
    }
    LGD_RUN(call, softmax_infogain, (call.input, out));
    return {loss, lse, grad, norm};
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> reduced(
      const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad) {
    const auto options = rows.logits.options().dtype(c10::CppTypeToScalarType<Acc>::value);
    const Acc denominator = static_cast<Acc>(divisor ? *divisor : double(count(rows.labels, rows.ignore_index)));
    const at::Tensor scale = at::scalar_tensor(Acc(1) / denominator, options);
    OptionalTensor row_scale;
    if (need_grad) {
      row_scale = sample_weight ? sample_weight->mul(scale) : scale.expand(rows.labels.sizes());
    }
    const auto [loss, lse, grad, norm] = forward(rows, row_scale, false, false);
    // as in Python, where there are more outputs: bit for bit
    const at::Tensor sum = (sample_weight ? loss.mul(*sample_weight) : loss).sum();
    return {at::scalar_tensor(sum.item<Acc>() / denominator, options), scale, grad};
  }

  static void backward(
      const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse,
      const OptionalTensor& made_for, const at::Tensor& grad) {
    like_logits(rows, grad, "grad");
    if (made_for && !grad_lse && grad_loss.sizes() == made_for->sizes() && agree<Acc>(grad_loss, *made_for)) {
      return;
    }
    Call<Acc> call(rows);
    SoftmaxInfogainOutput<Acc> out;
    want_gradient(rows, out, grad, grad_loss, grad_lse);
    out.made_for = row_input<Acc>(rows, made_for, "row_scale");
    LGD_RUN(call, softmax_infogain, (call.input, out));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> double_backward(
      const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse,
      const at::Tensor& grad_grad) {
    Call<Acc> call(rows);
    const at::Tensor grad_logits = empty_on_huge_pages(rows.logits),
                     grad_grad_loss = at::empty_like(grad_loss, at::MemoryFormat::Contiguous),
                     grad_grad_lse = at::empty_like(grad_grad_loss);
    SoftmaxInfogainDoubleBackward<Acc> io;
    io.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    io.grad_lse = row_input<Acc>(rows, grad_lse, "grad_lse");
    io.grad_grad = like_logits(rows, grad_grad, "grad_grad");
    io.grad_logits = rows_of(grad_logits, "logits");
    io.grad_grad_loss = per_row<Acc>(grad_grad_loss);
    io.grad_grad_lse = per_row<Acc>(grad_grad_lse);
    LGD_RUN(call, softmax_infogain_double_backward, (call.input, io));
    return {grad_logits, grad_grad_loss, grad_grad_lse};
  }

  static at::Tensor backward_matrix(const RowArguments& rows, int64_t n_rows, const at::Tensor& grad_loss) {
    Call<Acc> call(rows);
    call.input.infogain.n_rows = n_rows;
    const auto options = rows.logits.options().dtype(c10::CppTypeToScalarType<Acc>::value);
    const at::Tensor result = at::zeros({n_rows, call.input.classes}, options);
    const at::Tensor working_space = at::empty({2, call.input.outer * call.input.inner}, options);
    SoftmaxInfogainBackwardMatrix<Acc> io;
    io.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    io.max = working_space.data_ptr<Acc>();
    io.log_sum = io.max + working_space.size(1);
    io.result = result.data_ptr<Acc>();
    LGD_RUN(call, softmax_infogain_backward_matrix, (call.input, io));
    return result;
  }

 private:
  static void want_gradient(
      const RowArguments& rows, SoftmaxInfogainOutput<Acc>& out, const at::Tensor& grad, const at::Tensor& grad_loss,
      const OptionalTensor& grad_lse) {
    out.grad = like_logits(rows, grad, "grad");
    out.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    out.grad_lse = row_input<Acc>(rows, grad_lse, "grad_lse");
    out.stream_grad = static_cast<int64_t>(grad.nbytes()) >= kStreamFrom;
  }
};

// f(Kernels<Acc>{}) for the accumulation type of these logits.
template <typename F>
auto with_accumulation_type(const at::Tensor& logits, const F& f) {
  return logits.scalar_type() == at::kDouble ? f(Kernels<double>{}) : f(Kernels<float>{});
}

} // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> softmax_infogain(
    const RowArguments& rows, const OptionalTensor& row_scale, bool need_lse, bool need_norm) {
  return with_accumulation_type(
      rows.logits, [&](auto kernels) { return kernels.forward(rows, row_scale, need_lse, need_norm); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_infogain_reduced(
    const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad) {
  return with_accumulation_type(
      rows.logits, [&](auto kernels) { return kernels.reduced(rows, sample_weight, divisor, need_grad); });
}

at::Tensor softmax_infogain_backward(
    const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse) {
  const at::Tensor grad = empty_on_huge_pages(rows.logits);
  with_accumulation_type(
      rows.logits, [&](auto kernels) { kernels.backward(rows, grad_loss, grad_lse, std::nullopt, grad); });
  return grad;
}

void softmax_infogain_backward_(
    const at::Tensor& grad, const at::Tensor& row_scale, const RowArguments& rows, const at::Tensor& grad_loss,
    const OptionalTensor& grad_lse) {
  with_accumulation_type(
      rows.logits, [&](auto kernels) { kernels.backward(rows, grad_loss, grad_lse, row_scale, grad); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_infogain_double_backward(
    const RowArguments& rows, const at::Tensor& grad_loss, const OptionalTensor& grad_lse,
    const at::Tensor& grad_grad) {
  return with_accumulation_type(
      rows.logits, [&](auto kernels) { return kernels.double_backward(rows, grad_loss, grad_lse, grad_grad); });
}

at::Tensor softmax_infogain_backward_matrix(const RowArguments& rows, int64_t n_rows, const at::Tensor& grad_loss) {
  return with_accumulation_type(
      rows.logits, [&](auto kernels) { return kernels.backward_matrix(rows, n_rows, grad_loss); });
}

at::Tensor count_labels(const at::Tensor& labels, int64_t ignore_index, at::ScalarType dtype) {
  return at::scalar_tensor(count(labels, ignore_index), labels.options().dtype(dtype));
}
} // namespace lgd
