// The kernels of softmax_infogain compiled for the host, behind functions that Python's ctypes can call. The structs
// are those of cuda_on_host.py.

#include "cuda_on_host.h"

#include "../../csrc/cuda/count_labels.cu"
#include "../../csrc/cuda/softmax_infogain.cu"

namespace {

using namespace lgd;

struct Rows3 {
  void* data;
  int64_t dtype, outer_stride, class_stride, inner_stride;

  Rows view() const { return {data, static_cast<DType>(dtype), outer_stride, class_stride, inner_stride}; }
};

struct Rows2 {
  void* data;
  int64_t outer_stride, inner_stride;

  template <typename T>
  PerRow<T> view() const {
    return {static_cast<T*>(data), outer_stride, inner_stride};
  }
};

struct Arguments {
  int64_t outer, classes, inner;
  Rows3 logits, matrix; // matrix: (n_rows, C, 1)
  Rows2 labels, background, diagonal, crow, col, values;
  int64_t n_rows, ignore_index;
  double z_loss;
  Rows3 grad, grad_grad;
  Rows2 loss, lse, norm, max, log_sum, grad_loss, grad_lse, made_for, grad_grad_loss, grad_grad_lse, result;

  template <typename Acc>
  gpu::SoftmaxInfogainInput<Acc> input() const {
    gpu::SoftmaxInfogainInput<Acc> in;
    in.outer = outer;
    in.classes = static_cast<int>(classes);
    in.inner = inner;
    in.logits = logits.view();
    in.labels = labels.view<const int64_t>();
    in.ignore_index = ignore_index;
    in.z_loss = static_cast<Acc>(z_loss);
    gpu::InfogainView& h = in.infogain;
    h.matrix = matrix.data;
    h.matrix_dtype = static_cast<DType>(matrix.dtype);
    h.matrix_row_stride = matrix.outer_stride;
    h.matrix_class_stride = matrix.class_stride;
    h.background = background.data;
    h.diagonal = diagonal.data;
    h.diagonal_stride = diagonal.outer_stride;
    h.crow = static_cast<const int64_t*>(crow.data);
    h.col = static_cast<const int64_t*>(col.data);
    h.values = values.data;
    h.n_rows = n_rows;
    return in;
  }

  template <typename Acc>
  int forward(const gpu::Configuration& c) const {
    const gpu::SoftmaxInfogainOutput<Acc> out = {
        loss.view<Acc>(),
        lse.view<Acc>(),
        norm.view<Acc>(),
        max.view<Acc>(),
        log_sum.view<Acc>(),
        grad.view(),
        grad_loss.view<const Acc>(),
        grad_lse.view<const Acc>(),
        made_for.view<const Acc>()};
    return gpu::softmax_infogain<Acc>(input<Acc>(), out, c, nullptr);
  }

  template <typename Acc>
  int double_backward(const gpu::Configuration& c) const {
    const gpu::SoftmaxInfogainDoubleBackward<Acc> io = {
        grad_loss.view<const Acc>(), grad_lse.view<const Acc>(), grad_grad.view(), grad.view(),
        grad_grad_loss.view<Acc>(),  grad_grad_lse.view<Acc>()};
    return gpu::softmax_infogain_double_backward<Acc>(input<Acc>(), io, c, nullptr);
  }

  template <typename Acc>
  int backward_matrix() const {
    const gpu::SoftmaxInfogainBackwardMatrix<Acc> io = {
        grad_loss.view<const Acc>(), max.view<const Acc>(), log_sum.view<const Acc>(), static_cast<Acc*>(result.data)};
    return gpu::softmax_infogain_backward_matrix<Acc>(input<Acc>(), io, nullptr);
  }
};

void write(const gpu::Configuration& c, int* numbers) {
  const int values[] = {static_cast<int>(c.mode), c.lanes, c.threads, c.cluster};
  std::copy(values, values + 4, numbers);
}

gpu::Configuration read(const int* numbers) {
  return {static_cast<gpu::Mode>(numbers[0]), numbers[1], numbers[2], numbers[3]};
}

// f(Acc{}) for the accumulation type of these logits.
template <typename F>
auto with_accumulation_type(const Arguments& a, const F& f) {
  return static_cast<DType>(a.logits.dtype) == DType::Float64 ? f(double{}) : f(float{});
}

} // namespace

extern "C" {

// Whether the configuration fits.
bool configure(
    int64_t classes, int element_size, bool side_by_side, bool aligned, bool packed, int capability, int* c) {
  const gpu::RowShape row = {classes, element_size, side_by_side, aligned, packed, capability};
  write(gpu::configure(row), c);
  return gpu::fits(read(c), row);
}

void configuration_of(const Arguments& a, int capability, int* c) {
  const gpu::Configuration found = with_accumulation_type(
      a, [&](auto acc) { return gpu::configuration_of(a.input<decltype(acc)>(), a.grad.view(), capability); });
  write(found, c);
}

bool fits(const Arguments& a, const int* c) {
  return with_accumulation_type(
      a, [&](auto acc) { return gpu::fits(read(c), gpu::shape_of(a.input<decltype(acc)>(), a.grad.view(), 0)); });
}

int forward(const Arguments& a, const int* c) {
  return with_accumulation_type(a, [&](auto acc) { return a.forward<decltype(acc)>(read(c)); });
}

int double_backward(const Arguments& a, const int* c) {
  return with_accumulation_type(a, [&](auto acc) { return a.double_backward<decltype(acc)>(read(c)); });
}

int backward_matrix(const Arguments& a) {
  return with_accumulation_type(a, [&](auto acc) { return a.backward_matrix<decltype(acc)>(); });
}

} // extern "C"
