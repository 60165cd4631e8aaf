// decoupled_linear for one instruction set; compiled once for each.
//
// Work is cut into tiles whose place depends on the shape of a layer alone, so that no result depends on the threads or
// on how many layers there are. What is done to a tile's elements is done while the tile is in cache.

#include "decoupled_linear.h"

#include "../common/activations.h"
#include "gemm.h"
#include "parallel.h"
#include "residual_row.h"
#include "stack_rows.h"
#include "transpose.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kRows = 64;     // samples of a tile
constexpr int64_t kPanel = 64;    // outputs of a tile: one copy of W^T for them serves many tiles
constexpr int64_t kSamples = 512; // multiplied at once for the gradient of a weight
constexpr int64_t kInputs = 256;  // inputs of such a tile

int64_t at_most(int64_t size, int64_t limit) {
  return size < limit ? size : limit;
}

// body(layer, begin, end) for ranges that cover `size` items of every layer and start at multiples of `step`: whole
// layers where there are enough of them for the threads, parts otherwise.
template <typename Body>
void for_parts_of_layers(int64_t n_layers, int64_t size, int64_t step, const Body& body) {
  const int64_t steps = (size + step - 1) / step;
  const int64_t wanted = n_layers >= 2 * num_threads() ? 1 : at_most(steps, 2 * num_threads());
  const int64_t steps_each = steps == 0 ? 1 : (steps + wanted - 1) / wanted;
  const int64_t parts = (steps + steps_each - 1) / steps_each;
  parallel_for(0, n_layers * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % parts * steps_each * step;
      body(i / parts, begin, at_most(begin + steps_each * step, size));
    }
    release_multiplier();
  });
}

template <typename Acc>
const Acc* row_pointer(const Stack& stack, int64_t layer, int64_t row) {
  return static_cast<const Acc*>(stack.data) + layer * stack.layer_stride + row * stack.row_stride;
}

// phi and f of a layer: the activation stands before its product or after it.
template <typename F>
void with_phi(const LayerOptions& o, bool preactivation, const F& f) {
  preactivation ? with_activation(o.activation, f) : f(Identity{});
}
template <typename F>
void with_f(const LayerOptions& o, bool preactivation, const F& f) {
  preactivation ? f(Identity{}) : with_activation(o.activation, f);
}

// out[i] = f(in[i], i, n) by vectors, the last one shorter.
template <typename Acc, typename F>
void transform(const Acc* in, Acc* out, int64_t count, const F& f) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  for (int64_t i = 0; i < count; i += V) {
    const int64_t n = at_most(count - i, V);
    f(Vec::loadu(in + i, n), i, n).store(out + i, n);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// phi(z)
// ---------------------------------------------------------------------------------------------------------------------

template <typename Acc>
void fill(const LinearOperand<Acc>& io) {
  const auto& l = io.layers;
  for_parts_of_layers(l.n_layers, l.n_samples, kRows, [&](int64_t layer, int64_t begin, int64_t end) {
    const LayerOptions& o = l.options[layer];
    with_phi(o, l.preactivation, [&](auto phi) {
      for (int64_t sample = begin; sample < end; ++sample) {
        const Acc* z = read_run<Acc>(l.z, layer, sample, 0, l.d_in, Scratch::SkipInput);
        Acc* target = const_cast<Acc*>(row_pointer<Acc>(l.operand, layer, sample));
        transform(z, target, l.d_in, [&](auto v, int64_t, int64_t) { return decltype(phi)::at(v).value; });
        if (io.rounded_to != dtype_of<Acc>()) {
          char* rounded = scratch_of<char>(Scratch::Residual, l.d_in * element_size(io.rounded_to));
          store_row(target, Row{rounded, io.rounded_to, 1}, 0, l.d_in);
          load_row(ConstRow{rounded, io.rounded_to, 1}, 0, l.d_in, target); // back to `target`: the dtypes differ
        }
      }
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward: a tile of raw logits, and at once what follows from it
// ---------------------------------------------------------------------------------------------------------------------

template <typename Acc>
struct Forward {
  const DecoupledLinear<Acc>& io;
  const LinearLayers<Acc>& l = io.layers;

  // The energies of samples [begin, end) of a layer, panel by panel.
  void samples(int64_t layer, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      io.row_energy[layer * l.n_samples + i] = 0;
    }
    Acc* weight_t = scratch_of<Acc>(Scratch::Matrix, l.d_in * kPanel); // (d_in, kPanel)
    Acc* tile = scratch_of<Acc>(Scratch::Logits, kRows * kPanel);      // (kRows, kPanel)
    const LayerOptions& o = l.options[layer];
    for (int64_t first = 0; first < l.d_out; first += kPanel) {
      const int64_t outputs = at_most(l.d_out - first, kPanel);
      const Acc* weight = row_pointer<Acc>(l.weight, layer, first);
      transpose_matrix(weight, l.weight.row_stride, outputs, l.d_in, weight_t, kPanel);
      for (int64_t row = begin; row < end; row += kRows) {
        const int64_t rows = at_most(end - row, kRows);
        const Acc* operand = row_pointer<Acc>(l.operand, layer, row);
        multiply_tile(rows, outputs, l.d_in, operand, l.operand.row_stride, weight_t, kPanel, tile, kPanel, false);
        with_f(o, l.preactivation, [&](auto f) {
          with_hidden_loss(io.hidden_loss.code, [&](auto loss) {
            for (int64_t i = 0; i < rows; ++i) {
              finish<decltype(f), decltype(loss)>(layer, row + i, first, outputs, tile + i * kPanel);
            }
          });
        });
      }
    }
  }

  // One row of a tile: from the product to e, delta, q and the energy.
  template <typename F, typename Loss>
  void finish(int64_t layer, int64_t sample, int64_t first, int64_t count, Acc* product) const {
    using Vec = at::vec::Vectorized<Acc>;
    const LayerOptions& o = l.options[layer];
    const Vec scale(static_cast<Acc>(o.branch_scale));
    const Acc* bias = io.bias.data == nullptr ? nullptr : row_pointer<Acc>(io.bias, layer, 0) + first;
    transform(product, product, count, [&](Vec v, int64_t i, int64_t n) {
      return bias == nullptr ? v * scale : at::vec::fmadd(v, scale, Vec::loadu(bias + i, n));
    });
    const ResidualStacks stacks{io.target, io.multiplier, l.z, io.residual, io.delta, io.q};
    io.row_energy[layer * l.n_samples + sample] +=
        residual_run<F, Loss>(stacks, o, io.hidden_loss, product, layer, sample, first, count);
  }
};

template <typename Acc>
void forward(const DecoupledLinear<Acc>& io) {
  const auto& l = io.layers;
  const Forward<Acc> kernel{io};
  for_parts_of_layers(l.n_layers, l.n_samples, kRows, [&](int64_t layer, int64_t begin, int64_t end) {
    kernel.samples(layer, begin, end);
  });
  sum_row_energies(io.row_energy, l.n_layers, l.n_samples, io.energy);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

template <typename Acc>
struct Backward {
  const DecoupledLinearBackward<Acc>& io;
  const LinearLayers<Acc>& l = io.layers;

  Acc upstream(int64_t layer) const { return io.grad_energy == nullptr ? Acc(1) : io.grad_energy[layer]; }

  // dE/dz of samples [begin, end) = s phi'(z) (delta W) - c q.
  void of_z(int64_t layer, int64_t begin, int64_t end) const {
    Acc* tile = scratch_of<Acc>(Scratch::Logits, kRows * kPanel); // (kRows, kPanel)
    for (int64_t first = 0; first < l.d_in; first += kPanel) {
      const int64_t inputs = at_most(l.d_in - first, kPanel);
      for (int64_t row = begin; row < end; row += kRows) {
        const int64_t rows = at_most(end - row, kRows);
        multiply_tile(
            rows, inputs, l.d_out, row_pointer<Acc>(io.delta, layer, row), io.delta.row_stride,
            row_pointer<Acc>(l.weight, layer, 0) + first, l.weight.row_stride, tile, kPanel, false);
        with_phi(l.options[layer], l.preactivation, [&](auto phi) {
          for (int64_t i = 0; i < rows; ++i) {
            finish<decltype(phi)>(layer, row + i, first, inputs, tile + i * kPanel);
          }
        });
      }
    }
  }

  template <typename Phi>
  void finish(int64_t layer, int64_t sample, int64_t first, int64_t count, const Acc* product) const {
    using Vec = at::vec::Vectorized<Acc>;
    const LayerOptions& o = l.options[layer];
    const Vec scale(upstream(layer) * static_cast<Acc>(o.branch_scale));
    const Vec minus_skip(-upstream(layer) * static_cast<Acc>(o.skip));
    const auto target = OutputRun<Acc>(io.grad_z, layer, sample, first, count, Scratch::Residual);
    const Acc* z = read_run<Acc>(l.z, layer, sample, first, count, Scratch::SkipInput);
    const Acc* q = o.skip == 0 ? nullptr : read_run<Acc>(io.q, layer, sample, first, count, Scratch::Q);
    transform(product, target.data, count, [&](Vec v, int64_t i, int64_t n) {
      const Vec gradient = v * scale * Phi::at(Vec::loadu(z + i, n)).slope;
      return q == nullptr ? gradient : at::vec::fmadd(Vec::loadu(q + i, n), minus_skip, gradient);
    });
    target.finish();
  }

  // dE/dW and dE/db of outputs [begin, end), whose number is at most kPanel: delta^T phi(z), and delta's column sums.
  void of_weight(int64_t layer, int64_t begin, int64_t end) const {
    const int64_t outputs = end - begin, stride = at_most(l.n_samples, kSamples);
    Acc* delta_t = scratch_of<Acc>(Scratch::Delta, kPanel * stride); // (kPanel, samples)
    const int64_t columns = io.grad_weight.data == nullptr ? 0 : l.d_in;
    Acc* gradient = scratch_of<Acc>(Scratch::Gradient, kPanel * columns); // (kPanel, d_in)
    Acc sums[kPanel] = {};
    for (int64_t first = 0; first < l.n_samples; first += kSamples) {
      const int64_t samples = at_most(l.n_samples - first, kSamples);
      transpose_matrix(
          row_pointer<Acc>(io.delta, layer, first) + begin, io.delta.row_stride, samples, outputs, delta_t, stride);
      for (int64_t i = 0; i < outputs; ++i) {
        sums[i] += sum_of_run(delta_t + i * stride, samples);
      }
      for (int64_t column = 0; column < columns; column += kInputs) {
        multiply_tile(
            outputs, at_most(columns - column, kInputs), samples, delta_t, stride,
            row_pointer<Acc>(l.operand, layer, first) + column, l.operand.row_stride, gradient + column, columns,
            first > 0);
      }
    }
    store_gradients(layer, begin, outputs, gradient, sums);
  }

  void store_gradients(int64_t layer, int64_t begin, int64_t outputs, Acc* gradient, Acc* sums) const {
    using Vec = at::vec::Vectorized<Acc>;
    if (io.grad_bias.data != nullptr) {
      transform(sums, sums, outputs, [&](Vec v, int64_t, int64_t) { return v * Vec(upstream(layer)); });
      store_row(sums, writable_row_of(io.grad_bias, layer, 0), begin, outputs);
    }
    if (io.grad_weight.data != nullptr) {
      const Vec scale(l.n_samples == 0 ? Acc(0) : upstream(layer) * static_cast<Acc>(l.options[layer].branch_scale));
      for (int64_t i = 0; i < outputs; ++i) {
        Acc* row = gradient + i * l.d_in;
        transform(row, row, l.d_in, [&](Vec v, int64_t, int64_t) { return v * scale; });
        store_row(row, writable_row_of(io.grad_weight, layer, begin + i), 0, l.d_in);
      }
    }
  }

  static Acc sum_of_run(const Acc* values, int64_t count) {
    using Vec = at::vec::Vectorized<Acc>;
    constexpr int64_t V = Vec::size();
    Vec total(Acc(0));
    for (int64_t i = 0; i < count; i += V) {
      total = total + Vec::loadu(values + i, at_most(count - i, V)); // 0 beyond the end
    }
    return sum_of_lanes(total);
  }
};

template <typename Acc>
void backward(const DecoupledLinearBackward<Acc>& io) {
  const auto& l = io.layers;
  const Backward<Acc> kernel{io};
  if (io.grad_z.data != nullptr) {
    for_parts_of_layers(l.n_layers, l.n_samples, kRows, [&](int64_t layer, int64_t begin, int64_t end) {
      kernel.of_z(layer, begin, end);
    });
  }
  if (io.grad_weight.data != nullptr || io.grad_bias.data != nullptr) {
    for_parts_of_layers(l.n_layers, l.d_out, kPanel, [&](int64_t layer, int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += kPanel) {
        kernel.of_weight(layer, first, at_most(first + kPanel, end));
      }
    });
  }
}

} // namespace

#define LGD_DEFINE_DECOUPLED_LINEAR(Acc)                                   \
  void fill_operand(const LinearOperand<Acc>& io) {                        \
    fill(io);                                                              \
  }                                                                        \
  void decoupled_linear(const DecoupledLinear<Acc>& io) {                  \
    forward(io);                                                           \
  }                                                                        \
  void decoupled_linear_backward(const DecoupledLinearBackward<Acc>& io) { \
    backward(io);                                                          \
  }

LGD_DEFINE_DECOUPLED_LINEAR(float)
LGD_DEFINE_DECOUPLED_LINEAR(double)

} // namespace CPU_CAPABILITY
} // namespace lgd
