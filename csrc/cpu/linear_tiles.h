// The products of linear layers tile by tile, and what is done to the elements of a tile while it is in cache: the
// building blocks of decoupled_linear and decoupled_step.
//
// The place of a tile depends on the shape of its layer alone, so that no result depends on the threads, or on how many
// layers there are.
#pragma once

#include <cstdint>

#include "decoupled_linear.h"
#include "elementary.h"
#include "factors.h"
#include "parallel.h"
#include "residual_tile.h"
#include "tiles.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

// What is summed at once: rows of B that lie 4 KB apart fall out of the cache sooner than those that lie together (for
// 1024 outputs 93 GFLOP/s, and 110 in two pieces).
constexpr int64_t kOutputs = 512; // for the gradient of an input
constexpr int64_t kSamples = 256; // for the gradient of a weight
constexpr int64_t kInputs = 512;  // columns of a tile of such a gradient

// Into how many parts the work of every layer is cut: 1 where whole layers keep all threads busy, which is where the
// last thread is done at most 10 % late if each takes the next layer as soon as it is free; work(t) in any unit.
template <typename Work>
inline int64_t parts_of_layers(int64_t n_layers, const Work& work) {
  const int64_t threads = num_threads();
  double* busy = scratch_of<double>(Scratch::Sums, threads);
  for (int64_t i = 0; i < threads; ++i) {
    busy[i] = 0;
  }
  double total = 0, last = 0;
  for (int64_t t = 0; t < n_layers; ++t) {
    int64_t free = 0;
    for (int64_t i = 1; i < threads; ++i) {
      free = busy[i] < busy[free] ? i : free;
    }
    const double done = busy[free] += work(t);
    last = done > last ? done : last;
    total += work(t);
  }
  return 10 * last * static_cast<double>(threads) <= 11 * total ? 1 : 4 * threads;
}

// The same for layers of equal shapes.
inline int64_t parts_of_equal_layers(int64_t n_layers) {
  return parts_of_layers(n_layers, [](int64_t) { return 1.0; });
}

// body(t, begin, end) for so many ranges per layer, which cover its size(t) items and start at multiples of `step`.
template <typename Size, typename Body>
inline void for_parts_of_layers(int64_t n_layers, int64_t parts, int64_t step, const Size& size, const Body& body) {
  parallel_for(0, n_layers * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i / parts, part = i % parts;
      const int64_t items_each = tiles_of(tiles_of(size(t), step), parts) * step;
      const int64_t begin = at_most(part * items_each, size(t)), end = at_most(begin + items_each, size(t));
      if (begin < end || parts == 1) { // a whole layer has its turn even if there is nothing in it
        body(t, begin, end);
      }
    }
    release_multiplier();
  });
}

// body(first, count) for pieces of at most `size` that cover [begin, end).
template <typename Body>
inline void for_pieces(int64_t begin, int64_t end, int64_t size, const Body& body) {
  for (int64_t first = begin; first < end; first += size) {
    body(first, at_most(end - first, size));
  }
}

// The activation stands before a layer's product or after it.
inline int64_t phi_of(const LinearLayer& l) {
  return l.preactivation ? l.options.activation : 0;
}
inline int64_t f_of(const LinearLayer& l) {
  return l.preactivation ? 0 : l.options.activation;
}

// operand = phi(z) for samples [begin, end), where it is not z itself.
template <typename Acc>
void fill_operand(const LinearLayer& l, int64_t begin, int64_t end);

// The residual, delta, q and energy of samples [begin, end), the operand filled.
template <typename Acc>
void judge(
    const LinearLayer& l, const ResidualIo& io, const HiddenLoss& hidden_loss, int64_t begin, int64_t end,
    double* tile_energy);

// finish(tile, logits) for the tiles of raw logits of samples [begin, end); logits(i, j, n) as residual_tile wants
// them.
template <typename Acc, typename Finish>
inline void for_tiles_of_logits(const LinearLayer& l, int64_t begin, int64_t end, const Finish& finish) {
  using Vec = Vectorized<Acc>;
  Acc* product = scratch_of<Acc>(Scratch::Logits, kRows * kPanel); // (kRows, kPanel)
  const Vec scale(static_cast<Acc>(l.options.branch_scale));
  for_pieces(0, l.d_out, kPanel, [&](int64_t first, int64_t outputs) {
    const Matrix weight_t =
        transposed_second_factor<Acc>(l.weight, {first, outputs, 0, l.d_in}, l.narrow); // (d_in, outputs)
    const Acc* bias = l.bias.data == nullptr ? nullptr : row_pointer<Acc>(l.bias, 0) + first;
    for_pieces(begin, end, kRows, [&](int64_t row, int64_t rows) {
      multiply(rows, outputs, l.d_in, rows_from(l.operand, row), weight_t, product, kPanel, false);
      finish(Tile{row, rows, first, outputs}, [&](int64_t i, int64_t j, int64_t n) {
        const Vec v = Vec::loadu(product + i * kPanel + j, n);
        return bias == nullptr ? v * scale : at::vec::fmadd(v, scale, Vec::loadu(bias + j, n));
      });
    });
  });
}

// The sum of a layer's tile energies, in order.
inline double energy_of_tiles(const LinearLayer& l, const double* tile_energy) {
  return sum_in_order(tile_energy, energy_tiles(l.n_samples, l.d_out));
}

// finish(tile, gradient) for the tiles of dE/dz / factor = s phi'(z) (delta W) - c q of samples [begin, end);
// gradient(i, j, n) are the n elements of its row i from its column j on.
template <typename Acc, typename Finish>
inline void for_tiles_of_input_gradient(
    const LinearLayer& l, const Matrix& delta, const Matrix& q, Acc factor, int64_t begin, int64_t end,
    const Finish& finish) {
  using Vec = Vectorized<Acc>;
  Acc* product = scratch_of<Acc>(Scratch::Logits, kRows * kPanel); // (kRows, kPanel)
  const Vec scale(factor * static_cast<Acc>(l.options.branch_scale)),
      minus_skip(-factor * static_cast<Acc>(l.options.skip));
  for_pieces(0, l.d_in, kPanel, [&](int64_t first, int64_t inputs) {
    const Matrix weight = second_factor<Acc>(l.weight, {0, l.d_out, first, inputs}, l.narrow); // (d_out, inputs)
    for_pieces(begin, end, kRows, [&](int64_t row, int64_t rows) {
      const Tile tile{row, rows, first, inputs};
      for (int64_t output = 0; output == 0 || output < l.d_out; output += kOutputs) { // once even if d_out is 0
        const int64_t outputs = at_most(l.d_out - output, kOutputs);
        const Matrix of_outputs = first_factor<Acc>(delta, {row, rows, output, outputs}, l.narrow); // (rows, outputs)
        multiply(rows, inputs, outputs, of_outputs, rows_from(weight, output), product, kPanel, output > 0);
      }
      const auto z = read_tile<Acc>(l.z, tile, Scratch::SkipInput);
      const auto of_target = read_tile<Acc>(l.options.skip == 0 ? Matrix{} : q, tile, Scratch::Q);
      with_activation(phi_of(l), [&](auto phi) {
        finish(tile, [&](int64_t i, int64_t j, int64_t n) {
          const Vec slope = decltype(phi)::at(Vec::loadu(z.row(i) + j, n)).slope;
          const Vec v = Vec::loadu(product + i * kPanel + j, n) * scale * slope;
          const Acc* q_row = of_target.row(i);
          return q_row == nullptr ? v : at::vec::fmadd(Vec::loadu(q_row + j, n), minus_skip, v);
        });
      });
    });
  });
}

// finish(first, count, products, sums) for panels of the outputs [begin, end): the products (count, d_in) are
// delta^T phi(z), the sums those of delta over the samples. Without products if nobody wants them.
template <typename Acc, typename Finish>
inline void for_panels_of_outputs(
    const LinearLayer& l, const Matrix& delta, bool want_products, int64_t begin, int64_t end, const Finish& finish) {
  const int64_t columns = want_products ? l.d_in : 0;
  Acc* products = scratch_of<Acc>(Scratch::Gradient, kPanel * columns); // (kPanel, d_in)
  Matrix operand;                                                       // (samples, d_in)
  int64_t first_of_operand = -1;
  for_pieces(begin, end, kPanel, [&](int64_t output, int64_t outputs) {
    Acc sums[kPanel] = {};
    for (int64_t i = 0; i < outputs * columns && l.n_samples == 0; ++i) {
      products[i] = 0;
    }
    for_pieces(0, l.n_samples, kSamples, [&](int64_t sample, int64_t samples) {
      const Tile tile{sample, samples, output, outputs};
      const Matrix delta_t = transposed_first_factor<Acc>(delta, tile, l.narrow, sums); // (outputs, samples)
      if (columns > 0 && sample != first_of_operand) {
        operand = second_factor<Acc>(l.operand, {sample, samples, 0, columns}, l.narrow);
        first_of_operand = sample;
      }
      for_pieces(0, columns, kInputs, [&](int64_t column, int64_t inputs) {
        multiply(
            outputs, inputs, l.narrow ? even(samples) : samples, delta_t, columns_from(operand, column),
            products + column, columns, sample > 0);
      });
    });
    finish(output, outputs, products, sums);
  });
}

} // namespace CPU_CAPABILITY
} // namespace lgd
