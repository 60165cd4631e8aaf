// decoupled_step_ between tensors and kernels.

#include "decoupled_step.h"

#include <ATen/ops/empty.h>

#include <algorithm>

#include "../cpu/decoupled_step.h"
#include "huge_pages.h"
#include "stacks.h"

namespace lgd {
namespace {

// A list of stacks (T_i, n, d) as the list of their layers; an empty list has none. What is not contiguous along its
// rows is copied, and `write_back` copies it back.
class Layers {
 public:
  Layers(const TensorList& stacks, const char* name) : given_(stacks), name_(name) {
    for (const at::Tensor& stack : stacks) {
      TORCH_CHECK_VALUE(
          stack.dim() == 3, name, ": expected stacks of shape (T, rows, columns), got shape ", stack.sizes());
      const StackInput input(stack, stack.sizes(), name);
      used_.push_back(input.tensor);
      for (int64_t t = 0; t < stack.size(0); ++t) {
        layers_.push_back({input.stack.layer(t), stack.size(1), stack.size(2), stack.scalar_type()});
      }
    }
  }

  int64_t size() const { return static_cast<int64_t>(layers_.size()); }

  int64_t rows(int64_t t) const { return layers_[t].rows; }
  int64_t columns(int64_t t) const { return layers_[t].columns; }

  // Layer t, if there are any.
  Matrix operator[](int64_t t) const { return layers_.empty() ? Matrix{} : layers_[t].matrix; }

  // Raise unless there are `count` layers (or none, where that is allowed).
  void check_count(int64_t count, bool optional) const {
    TORCH_CHECK_VALUE(
        size() == count || (optional && layers_.empty()), name_, ": has ", size(), " layers, expected ", count);
  }

  void check(int64_t t, int64_t rows, int64_t columns, at::ScalarType dtype) const {
    if (layers_.empty()) {
      return;
    }
    const Layer& layer = layers_[t];
    TORCH_CHECK_VALUE(
        layer.rows == rows && layer.columns == columns, name_, ": expected shape (", rows, ", ", columns,
        ") for layer ", t, ", got (", layer.rows, ", ", layer.columns, ")");
    TORCH_CHECK_TYPE(layer.dtype == dtype, name_, ": expected dtype ", dtype, " for layer ", t, ", got ", layer.dtype);
  }

  void write_back() const {
    for (size_t i = 0; i < used_.size(); ++i) {
      if (!used_[i].is_same(given_[i])) {
        given_[i].copy_(used_[i]);
      }
    }
  }

 private:
  struct Layer {
    Matrix matrix;
    int64_t rows, columns;
    at::ScalarType dtype;
  };

  const TensorList& given_;
  const char* name_;
  TensorList used_;
  std::vector<Layer> layers_;
};

// The same list with stacks of vectors (T_i, d) taken for stacks of one row.
TensorList as_rows(const TensorList& stacks) {
  TensorList rows;
  for (const at::Tensor& stack : stacks) {
    rows.push_back(stack.dim() == 2 ? stack.unsqueeze(1) : stack);
  }
  return rows;
}

// Matrices cut out of one tensor, each from a multiple of 64 bytes on.
class Workspace {
 public:
  Matrix matrix(int64_t rows, int64_t columns, DType dtype) {
    const int64_t offset = used_;
    used_ += (rows * columns * element_size(dtype) + kAligned - 1) / kAligned * kAligned;
    return {memory_.defined() ? static_cast<char*>(memory_.mutable_data_ptr()) + offset : nullptr, dtype, columns};
  }

  // What was asked for so far is there when it is asked for again, in the same order.
  void allocate() {
    memory_ = empty_on_huge_pages({used_ / int64_t(sizeof(float))}, at::kFloat); // a dtype that has a NaN, for tests
    used_ = 0;
  }

 private:
  static constexpr int64_t kAligned = 64;
  at::Tensor memory_;
  int64_t used_ = 0;
};

constexpr int64_t kPlainSgd = 1, kAdam = 3;                         // positions in lgd_kernels.reference.UPDATE_RULES
constexpr int64_t kUpdateNumbers = sizeof(Update) / sizeof(double); // of a stack of parameters, in `update_numbers`

// Those of all stacks, once they are checked.
const double* numbers_of(const DecoupledStepArguments& a) {
  const int64_t n_stacks = a.weight.size() + a.bias.size();
  TORCH_CHECK_VALUE(
      a.update_numbers.scalar_type() == at::kDouble && a.update_numbers.is_contiguous() &&
          a.update_numbers.sizes() == at::IntArrayRef({n_stacks, kUpdateNumbers}),
      "update_numbers: expected a contiguous float64 tensor of shape [", n_stacks, ", ", kUpdateNumbers, "], got ",
      a.update_numbers.scalar_type(), " of shape ", a.update_numbers.sizes());
  return a.update_numbers.const_data_ptr<double>();
}

// The layers of stacks of parameters, with the buffers and numbers of the optimizer.
class Parameters {
 public:
  Parameters(
      const TensorList& value, const TensorList& first, const TensorList& second, int64_t rule, const double* numbers,
      const char* name)
      : values_(value, name), first_(first, name), second_(second, name) {
    for (const at::Tensor& stack : value) {
      const Update update{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]};
      updates_.insert(updates_.end(), stack.size(0), update);
      numbers += kUpdateNumbers;
    }
    first_.check_count(rule == kPlainSgd ? 0 : values_.size(), false);
    second_.check_count(rule == kAdam ? values_.size() : 0, false);
  }

  const Layers& values() const { return values_; }

  Parameter operator[](int64_t t) const {
    return values_.size() == 0 ? Parameter{} : Parameter{values_[t], first_[t], second_[t], updates_[t]};
  }

  void check(int64_t t, int64_t rows, int64_t columns, at::ScalarType dtype) const {
    for (const Layers* layers : {&values_, &first_, &second_}) {
      layers->check(t, rows, columns, dtype);
    }
  }

  void write_back() const {
    for (const Layers* layers : {&values_, &first_, &second_}) {
      layers->write_back();
    }
  }

 private:
  Layers values_, first_, second_;
  std::vector<Update> updates_;
};

template <typename Acc>
class Step {
 public:
  explicit Step(const DecoupledStepArguments& a)
      : a_(a),
        bias_rows_(as_rows(a.bias)),
        bias_first_rows_(as_rows(a.bias_first)),
        bias_second_rows_(as_rows(a.bias_second)),
        x_(a.x.unsqueeze(0), {1, a.x.size(0), a.x.size(1)}, "x"),
        z_(a.z, "z"),
        multiplier_(a.multiplier, "multiplier"),
        velocity_(a.velocity, "velocity"),
        residual_(a.residual, "residual"),
        weight_(a.weight, a.weight_first, a.weight_second, a.update_rule, numbers_of(a), "weight"),
        bias_(
            bias_rows_, bias_first_rows_, bias_second_rows_, a.update_rule,
            numbers_of(a) + kUpdateNumbers * a.weight.size(), "bias"),
        n_layers_(weight_.values().size()),
        classes_(n_layers_ == 0 ? 0 : weight_.values().rows(n_layers_ - 1)),
        options_(layer_options(n_layers_, a.activation, a.rho, a.skip, a.branch_scale, dual_steps())),
        infogain_(a.h, a.x.device(), classes_),
        rounded_stacks_(needs_rounded_weights() ? rounded(a.weight) : TensorList{}),
        rounded_weights_(rounded_stacks_, "weight") {
    check();
  }

  at::Tensor run() {
    const at::Tensor energy = at::empty({n_layers_}, kAcc), loss = at::empty({a_.x.size(0)}, kAcc);
    make_layers(); // once for the size of the working space, and once for its places
    workspace_.allocate();
    make_layers();
    DecoupledStep<Acc> io;
    io.layers = layers_.data();
    io.n_layers = n_layers_;
    io.hidden_loss = {a_.hidden_loss, a_.kappa};
    io.update_rule = a_.update_rule;
    io.head = head(loss);
    io.steps = a_.steps;
    io.step_size = a_.step_size;
    io.momentum = a_.z_momentum;
    io.energy = energy.template data_ptr<Acc>();
    LGD_FOR_THIS_CPU(decoupled_step, (io))
    for (const Layers* layers : {&z_, &multiplier_, &velocity_, &residual_}) {
      layers->write_back();
    }
    weight_.write_back();
    bias_.write_back();
    return energy;
  }

 private:
  static constexpr at::ScalarType kAcc = c10::CppTypeToScalarType<Acc>::value;

  // Of the operands of products.
  at::ScalarType product_dtype() const { return a_.x.scalar_type() == at::kBFloat16 ? at::kBFloat16 : kAcc; }

  bool is_narrow(int64_t t) const {
    return takes_bfloat16_products(product_dtype(), weight_.values().columns(t), weight_.values().rows(t));
  }

  // Where products of bfloat16 have to run in Acc.
  bool needs_rounded_weights() const {
    bool needed = false;
    for (int64_t t = 0; t < n_layers_; ++t) {
      needed |= product_dtype() != kAcc && !is_narrow(t);
    }
    return needed;
  }

  TensorList rounded(const TensorList& stacks) const {
    TensorList result;
    for (const at::Tensor& stack : stacks) {
      result.push_back(stack.to(product_dtype()).to(kAcc));
    }
    return result;
  }

  // Of the layers whose target has a multiplier.
  std::vector<double> dual_steps() const {
    std::vector<double> steps(n_layers_, multiplier_.size() == 0 ? 0.0 : a_.dual_step);
    if (!steps.empty()) {
      steps.back() = 0;
    }
    return steps;
  }

  void check() const {
    TORCH_CHECK_VALUE(n_layers_ > 0, "weight: expected at least 1 layer");
    z_.check_count(n_layers_ - 1, false);
    multiplier_.check_count(n_layers_ - 1, true);
    velocity_.check_count(n_layers_ - 1, true);
    residual_.check_count(n_layers_ - 1, true);
    bias_.values().check_count(n_layers_, true);
    int64_t d_in = a_.x.size(1);
    for (int64_t t = 0; t < n_layers_; ++t) {
      const int64_t d_out = weight_.values().rows(t);
      weight_.check(t, d_out, d_in, kAcc);
      bias_.check(t, 1, d_out, kAcc);
      for (const Layers* layers : {&z_, &multiplier_, &velocity_, &residual_}) {
        if (t < n_layers_ - 1) {
          layers->check(t, a_.x.size(0), d_out, a_.x.scalar_type());
        }
      }
      d_in = d_out;
    }
    check_target();
  }

  void check_target() const {
    const int64_t n = a_.x.size(0);
    if (a_.squared_error) {
      TORCH_CHECK_VALUE(
          a_.target.dim() == 2 && a_.target.size(0) == n && a_.target.size(1) == classes_, "target: expected shape (",
          n, ", ", classes_, "), got ", a_.target.sizes());
      return;
    }
    TORCH_CHECK_VALUE(
        a_.target.dim() == 1 && a_.target.size(0) == n, "target: expected shape (", n, "), got ", a_.target.sizes());
    TORCH_CHECK_TYPE(
        a_.target.scalar_type() == at::kLong, "target: dtype must be int64, got ", a_.target.scalar_type());
    const int64_t* labels = a_.target.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = labels[i * a_.target.stride(0)];
      TORCH_CHECK_INDEX(
          label == a_.ignore_index || (label >= 0 && label < infogain_.view.n_rows), "target: value ", label,
          " at position ", i, " is out of range for ", infogain_.view.n_rows, " classes");
    }
  }

  void make_layers() {
    const int64_t n = a_.x.size(0);
    layers_.assign(n_layers_, {});
    Matrix z = x_.stack.layer(0);
    for (int64_t t = 0; t < n_layers_; ++t) {
      StepLayer& layer = layers_[t];
      const int64_t d_out = weight_.values().rows(t), d_in = weight_.values().columns(t);
      layer.weight = weight_[t];
      layer.bias = bias_[t];
      const bool narrow = is_narrow(t);
      const DType products = product_dtype() == kAcc ? kDType : DType::BFloat16, held = narrow ? products : kDType;
      layer.linear = {n, d_in, d_out, a_.preactivation, options_[t], z, narrow, z, products};
      layer.linear.weight = narrow || products == kDType ? layer.weight.value : rounded_weights_[t];
      layer.linear.bias = layer.bias.value;
      if (z.dtype != held || (a_.preactivation && options_[t].activation != 0)) {
        layer.linear.operand = workspace_.matrix(n, d_in, held);
      }
      layer.io.skip_input = z;
      layer.io.delta = workspace_.matrix(n, d_out, products);
      layer.io.q = workspace_.matrix(n, d_out, kDType);
      layer.tile_energy = tile_energies(t, energy_tiles(n, d_out));
      if (t > 0) {
        layer.q_of_input = layers_[t - 1].io.q;
        layer.velocity = velocity_[t - 1];
      }
      if (t < n_layers_ - 1) {
        z = z_[t];
        layer.io.target = z;
        layer.io.multiplier = layer.io.new_multiplier = multiplier_[t];
        layer.io.residual = residual_[t];
      }
    }
  }

  double* tile_energies(int64_t t, int64_t count) {
    tile_energy_.resize(n_layers_);
    tile_energy_[t].resize(count);
    return tile_energy_[t].data();
  }

  Head<Acc> head(const at::Tensor& loss) {
    StepLayer& last = layers_.back();
    if (a_.squared_error) {
      target_ = StackInput(a_.target.to(kAcc).unsqueeze(0), {1, a_.target.size(0), a_.target.size(1)}, "target");
      last.io.target = target_.stack.layer(0);
      return {};
    }
    Head<Acc> head;
    logits_ = empty_on_huge_pages({a_.x.size(0), classes_}, kAcc);
    head.logits = stack_output(logits_.unsqueeze(0)).layer(0);
    head.loss = loss.data_ptr<Acc>();
    head.rows.classes = classes_;
    head.rows.inner = 1;
    head.rows.logits = {nullptr, kDType, classes_, 1, 1};
    head.rows.labels = {a_.target.const_data_ptr<int64_t>(), a_.target.stride(0), 1};
    head.rows.ignore_index = a_.ignore_index;
    head.rows.infogain = infogain_.view;
    return head;
  }

  static constexpr DType kDType = std::is_same_v<Acc, double> ? DType::Float64 : DType::Float32;

  const DecoupledStepArguments& a_;
  const TensorList bias_rows_, bias_first_rows_, bias_second_rows_;
  const StackInput x_;
  const Layers z_, multiplier_, velocity_, residual_;
  const Parameters weight_, bias_;
  const int64_t n_layers_, classes_;
  const std::vector<LayerOptions> options_;
  const Infogain<Acc> infogain_;
  const TensorList rounded_stacks_;
  const Layers rounded_weights_;
  Workspace workspace_;
  std::vector<StepLayer> layers_;
  std::vector<std::vector<double>> tile_energy_;
  StackInput target_;
  at::Tensor logits_;
};

} // namespace

at::Tensor decoupled_step_(const DecoupledStepArguments& a) {
  TORCH_CHECK_VALUE(a.x.dim() == 2, "x: expected shape (n, d), got ", a.x.sizes());
  TORCH_CHECK_VALUE(
      a.squared_error || a.skip.empty() || a.skip.back() == 0,
      "skip: the last layer's must be 0 for softmax_infogain, got ", a.skip.back());
  return a.x.scalar_type() == at::kDouble ? Step<double>(a).run() : Step<float>(a).run();
}

} // namespace lgd
