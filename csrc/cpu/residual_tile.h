// The residual of one layer on a tile of raw logits: what local_residual does to all of them, and decoupled_linear to a
// tile that a product has just left in cache.
#pragma once

#include <cstdint>

#include "elementary.h"
#include "tiles.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

template <typename Acc>
struct ResidualNumbers {
  Acc rho, skip, dual_step, kappa;
};

// One row of a tile; nullptr for what is absent or not wanted.
template <typename Acc>
struct ResidualRow {
  const Acc *target, *multiplier, *skip_input;
  Acc *new_multiplier, *residual, *delta, *q;
};

// The n elements at i, whose raw logits are `a`; returns their energies.
template <typename Activation, typename Loss, typename Acc>
inline Vectorized<Acc> residual_vector(
    Vectorized<Acc> a, const ResidualRow<Acc>& row, const ResidualNumbers<Acc>& numbers, int64_t i, int64_t n) {
  using Vec = Vectorized<Acc>;
  const auto f = Activation::at(a);
  Vec prediction = f.value;
  if (row.skip_input != nullptr) {
    prediction = at::vec::fmadd(Vec(numbers.skip), Vec::loadu(row.skip_input + i, n), prediction);
  }
  const Vec e = Vec::loadu(row.target + i, n) - prediction;
  const auto loss = Loss::at(e, Vec(numbers.kappa));
  Vec q = Vec(numbers.rho) * loss.slope, energy = Vec(numbers.rho) * loss.value;
  if (row.multiplier != nullptr || numbers.dual_step != 0) {
    Vec lambda = Vec(numbers.dual_step) * e;
    if (row.multiplier != nullptr) {
      const Vec before = Vec::loadu(row.multiplier + i, n);
      lambda = numbers.dual_step == 0 ? before : before + lambda;
    }
    if (row.new_multiplier != nullptr) {
      lambda.store(row.new_multiplier + i, n);
    }
    q = q + lambda;
    energy = at::vec::fmadd(lambda, e, energy);
  }
  if (row.residual != nullptr) {
    e.store(row.residual + i, n);
  }
  if (row.q != nullptr) {
    q.store(row.q + i, n);
  }
  if (row.delta != nullptr) {
    (q.neg() * f.slope).store(row.delta + i, n);
  }
  return energy;
}

// Sums of vectors, row by row, without a horizontal sum for each: lane by lane, in double.
template <typename Acc>
class LaneSums {
  static constexpr int V = Vectorized<Acc>::size();
  double lanes_[V] = {};

 public:
  inline void add(Vectorized<Acc> row) {
    Acc parts[V];
    row.store(parts);
    for (int lane = 0; lane < V; ++lane) {
      lanes_[lane] += static_cast<double>(parts[lane]);
    }
  }
  double total() const {
    double sum = 0;
    for (const double lane : lanes_) {
      sum += lane;
    }
    return sum;
  }
};

// The energy of a tile; logits(i, j, n) are the n raw logits of its row i from its column j on.
template <typename Activation, typename Loss, typename Acc, typename Logits>
inline double residual_tile(
    const ResidualIo& io, const LayerOptions& o, Acc kappa, const Tile& tile, const Logits& logits) {
  using Vec = Vectorized<Acc>;
  const ResidualNumbers<Acc> numbers{
      static_cast<Acc>(o.rho), static_cast<Acc>(o.skip), static_cast<Acc>(o.dual_step), kappa};
  const auto target = read_tile<Acc>(io.target, tile, Scratch::Target);
  const auto multiplier = read_tile<Acc>(io.multiplier, tile, Scratch::Multiplier);
  const auto skip_input = read_tile<Acc>(o.skip == 0 ? Matrix{} : io.skip_input, tile, Scratch::SkipInput);
  const OutputTile<Acc> new_multiplier(io.new_multiplier, tile, Scratch::Vector);
  const OutputTile<Acc> residual(io.residual, tile, Scratch::Residual), delta(io.delta, tile, Scratch::Delta),
      q(io.q, tile, Scratch::Q);
  LaneSums<Acc> energy;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const ResidualRow<Acc> row{target.row(i),        multiplier.row(i), skip_input.row(i), new_multiplier.view.row(i),
                               residual.view.row(i), delta.view.row(i), q.view.row(i)};
    Vec of_row(Acc(0));
    for_vectors<Acc>(tile.columns, [&](int64_t j, int64_t n) {
      const Vec of_vector = residual_vector<Activation, Loss>(logits(i, j, n), row, numbers, j, n);
      // what lies beyond the end is loaded as 0, whose energy need not be 0
      of_row = of_row + (n == Vec::size() ? of_vector : first_lanes(n, of_vector, Vec(Acc(0))));
    });
    energy.add(of_row);
  }
  new_multiplier.finish();
  residual.finish();
  delta.finish();
  q.finish();
  return energy.total();
}

// residual_tile for the activation and the hidden loss that codes name.
template <typename Acc, typename Logits>
inline double residual_tile(
    const ResidualIo& io, const LayerOptions& o, int64_t activation, const HiddenLoss& hidden_loss, const Tile& tile,
    const Logits& logits) {
  double energy = 0;
  with_activation(activation, [&](auto f) {
    with_hidden_loss(hidden_loss.code, [&](auto loss) {
      energy = residual_tile<decltype(f), decltype(loss)>(io, o, static_cast<Acc>(hidden_loss.kappa), tile, logits);
    });
  });
  return energy;
}

// The sum in order.
inline double sum_in_order(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += values[i];
  }
  return sum;
}

} // namespace CPU_CAPABILITY
} // namespace lgd
