// decoupled_linear for one instruction set; compiled once for each.

#include "decoupled_linear.h"

#include "linear_tiles.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

// About how long `products` products of a layer take, where what is done to each element counts like two inputs more.
double work_of(const LinearLayer& l, int64_t products) {
  return static_cast<double>(l.n_samples) * static_cast<double>(l.d_out) * static_cast<double>(products * l.d_in + 2);
}

template <typename Acc>
void forward(const DecoupledLinear<Acc>& io) {
  const int64_t parts = parts_of_layers(io.n_layers, [&](int64_t t) { return work_of(io.layers[t].linear, 1); });
  for_parts_of_layers(
      io.n_layers, parts, kRows, [&](int64_t t) { return io.layers[t].linear.n_samples; },
      [&](int64_t t, int64_t begin, int64_t end) {
        const DecoupledLinearLayer& layer = io.layers[t];
        fill_operand<Acc>(layer.linear, begin, end);
        judge<Acc>(layer.linear, layer.io, io.hidden_loss, begin, end, layer.tile_energy);
      });
  for (int64_t t = 0; t < io.n_layers; ++t) {
    io.energy[t] = static_cast<Acc>(energy_of_tiles(io.layers[t].linear, io.layers[t].tile_energy));
  }
}

// The gradients of the weight and the bias for outputs [begin, end), the operand filled.
template <typename Acc>
void parameter_gradients(const DecoupledLinearBackwardLayer& layer, int64_t begin, int64_t end) {
  using Vec = Vectorized<Acc>;
  const LinearLayer& l = layer.linear;
  const Vec of_weight(static_cast<Acc>(layer.upstream * l.options.branch_scale)),
      of_bias(static_cast<Acc>(layer.upstream));
  const auto scaled = [](Acc* values, int64_t count, Vec scale) {
    for_vectors<Acc>(count, [&](int64_t i, int64_t n) { (Vec::loadu(values + i, n) * scale).store(values + i, n); });
    return values;
  };
  const auto store = [&](int64_t first, int64_t count, Acc* products, Acc* sums) {
    if (layer.grad_bias.data != nullptr) {
      store_row<Acc>(scaled(sums, count, of_bias), row_of(layer.grad_bias, 0), first, count);
    }
    for (int64_t i = 0; i < count && layer.grad_weight.data != nullptr; ++i) {
      Acc* row = scaled(products + i * l.d_in, l.d_in, of_weight);
      store_row<Acc>(row, row_of(layer.grad_weight, first + i), 0, l.d_in);
    }
  };
  for_panels_of_outputs<Acc>(l, layer.delta, layer.grad_weight.data != nullptr, begin, end, store);
}

// to = factor * from for samples [begin, end), where it is wanted.
template <typename Acc>
void scale_rows(const Matrix& from, const Matrix& to, int64_t columns, Acc factor, int64_t begin, int64_t end) {
  using Vec = Vectorized<Acc>;
  if (to.data == nullptr) {
    return;
  }
  const Vec scale(factor);
  for_pieces(0, columns, kInputs, [&](int64_t column, int64_t width) {
    for_pieces(begin, end, kRows, [&](int64_t row, int64_t rows) {
      const Tile tile{row, rows, column, width};
      const auto given = read_tile<Acc>(from, tile, Scratch::Q);
      const OutputTile<Acc> made(to, tile, Scratch::Residual);
      for (int64_t i = 0; i < rows; ++i) {
        const Acc* source = given.row(i);
        Acc* target = made.view.row(i);
        for_vectors<Acc>(
            width, [&](int64_t j, int64_t n) { (Vec::loadu(source + j, n) * scale).store(target + j, n); });
      }
      made.finish();
    });
  });
}

template <typename Acc>
void backward(const DecoupledLinearBackward<Acc>& io) {
  const int64_t parts = parts_of_layers(io.n_layers, [&](int64_t t) {
    const DecoupledLinearBackwardLayer& layer = io.layers[t];
    return work_of(layer.linear, (layer.grad_z.data != nullptr) + (layer.grad_weight.data != nullptr));
  });
  const auto wants_parameters = [&](int64_t t) {
    return io.layers[t].grad_weight.data != nullptr || io.layers[t].grad_bias.data != nullptr;
  };
  for_parts_of_layers(
      io.n_layers, parts, kRows, [&](int64_t t) { return io.layers[t].linear.n_samples; },
      [&](int64_t t, int64_t begin, int64_t end) {
        const DecoupledLinearBackwardLayer& layer = io.layers[t];
        const Acc upstream = static_cast<Acc>(layer.upstream);
        scale_rows<Acc>(layer.q, layer.grad_target, layer.linear.d_out, upstream, begin, end);
        scale_rows<Acc>(layer.residual, layer.grad_multiplier, layer.linear.d_out, upstream, begin, end);
        if (layer.grad_weight.data != nullptr) {
          fill_operand<Acc>(layer.linear, begin, end);
        }
        if (layer.grad_z.data != nullptr) {
          for_tiles_of_input_gradient<Acc>(
              layer.linear, layer.delta, layer.q, upstream, begin, end, [&](const Tile& tile, const auto& gradient) {
                const OutputTile<Acc> target(layer.grad_z, tile, Scratch::Residual);
                for (int64_t i = 0; i < tile.rows; ++i) {
                  Acc* row = target.view.row(i);
                  for_vectors<Acc>(tile.columns, [&](int64_t j, int64_t n) { gradient(i, j, n).store(row + j, n); });
                }
                target.finish();
              });
        }
        if (parts == 1 && wants_parameters(t)) { // while delta is in cache
          parameter_gradients<Acc>(layer, 0, layer.linear.d_out);
        }
      });
  if (parts > 1) {
    for_parts_of_layers(
        io.n_layers, parts, kPanel, [&](int64_t t) { return wants_parameters(t) ? io.layers[t].linear.d_out : 0; },
        [&](int64_t t, int64_t begin, int64_t end) { parameter_gradients<Acc>(io.layers[t], begin, end); });
  }
}

} // namespace

#define LGD_DEFINE_DECOUPLED_LINEAR(Acc)                                   \
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
