// softmax_infogain on the CPU: what its glue does beyond that of every device.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "../cpu/softmax_infogain.h"
#include "huge_pages.h"
#include "softmax_infogain_glue.h"

namespace lgd {

constexpr int64_t kCountGrain = 32768; // labels for one thread: a few microseconds

inline int64_t count(const at::Tensor& labels, int64_t ignore_index) {
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

template <typename A>
struct Cpu {
  using Acc = A;
  using Input = SoftmaxInfogainInput<Acc>;
  using Output = SoftmaxInfogainOutput<Acc>;
  using DoubleBackward = SoftmaxInfogainDoubleBackward<Acc>;

  static constexpr int64_t kMostClasses = std::numeric_limits<int64_t>::max();

  static at::Tensor empty_like(const at::Tensor& logits) { return empty_on_huge_pages(logits); }

  static void run(const Call<Cpu>& call, Output out) {
    out.stream_grad = static_cast<int64_t>(call.logits.nbytes()) >= kStreamFrom;
    run_checked(call, [&](const Input& in) { LGD_FOR_THIS_CPU(softmax_infogain, (in, out)) });
  }

  static void run(const Call<Cpu>& call, const DoubleBackward& io) {
    run_checked(call, [&](const Input& in) { LGD_FOR_THIS_CPU(softmax_infogain_double_backward, (in, io)) });
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> reduced(
      const RowArguments& rows, const OptionalTensor& sample_weight, std::optional<double> divisor, bool need_grad) {
    const at::TensorOptions options = options_of_rows<Acc>(rows.logits);
    const Acc denominator = static_cast<Acc>(divisor ? *divisor : double(count(rows.labels, rows.ignore_index)));
    const at::Tensor scale = at::scalar_tensor(Acc(1) / denominator, options);
    OptionalTensor row_scale;
    if (need_grad) {
      row_scale = sample_weight ? sample_weight->mul(scale) : scale.expand(rows.labels.sizes());
    }
    const auto [loss, lse, grad, norm] = SoftmaxInfogain<Cpu>::forward(rows, row_scale, false, false);
    // as in Python, where there are more outputs: bit for bit
    const at::Tensor sum = (sample_weight ? loss.mul(*sample_weight) : loss).sum();
    return {at::scalar_tensor(sum.template item<Acc>() / denominator, options), scale, grad};
  }

  static at::Tensor backward_matrix(const RowArguments& rows, int64_t n_rows, const at::Tensor& grad_loss) {
    Call<Cpu> call(rows);
    call.input.infogain.n_rows = n_rows;
    const at::TensorOptions options = options_of_rows<Acc>(rows.logits);
    const at::Tensor result = at::zeros({n_rows, call.input.classes}, options);
    const at::Tensor working_space = at::empty({2, call.input.outer * call.input.inner}, options);
    SoftmaxInfogainBackwardMatrix<Acc> io;
    io.grad_loss = row_input<Acc>(rows, grad_loss, "grad_loss");
    io.max = working_space.data_ptr<Acc>();
    io.log_sum = io.max + working_space.size(1);
    io.result = result.data_ptr<Acc>();
    run_checked(call, [&](const Input& in) { LGD_FOR_THIS_CPU(softmax_infogain_backward_matrix, (in, io)) });
    return result;
  }

  static at::Tensor count_labels(const at::Tensor& labels, int64_t ignore_index, at::ScalarType dtype) {
    return at::scalar_tensor(count(labels, ignore_index), labels.options().dtype(dtype));
  }

  // Whether two per-row tensors agree everywhere: then a gradient made for one of them serves the other.
  static bool agree(const at::Tensor& a, const at::Tensor& b) {
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

 private:
  // Beyond this many bytes the gradient would not stay in the last-level cache anyway.
  static constexpr int64_t kStreamFrom = int64_t(16) << 20;

  // Run a kernel on the input, unless there is none, and throw IndexError if it met a label that is out of range.
  template <typename Kernel>
  static void run_checked(const Call<Cpu>& call, const Kernel& kernel) {
    if (call.empty()) {
      return;
    }
    constexpr int64_t none = std::numeric_limits<int64_t>::max();
    int64_t first_bad_label = none;
    Input in = call.input;
    in.first_bad_label = &first_bad_label;
    kernel(in);
    if (first_bad_label != none) {
      const at::Tensor value = call.labels[first_bad_label / in.inner][first_bad_label % in.inner];
      TORCH_CHECK_INDEX(
          false, "labels: value ", value.template item<int64_t>(), " at position ", first_bad_label,
          " is out of range for ", in.infogain.n_rows, " classes");
    }
  }
};

} // namespace lgd
