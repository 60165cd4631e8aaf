// The residual of one layer along a run of units of one sample, from raw logits: what local_residual does to every row
// and decoupled_linear to every row of a tile while it is in cache.
#pragma once

#include <cstdint>

#include "elementary.h"
#include "stack_rows.h"
#include "vec_math.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

// Pointers of the accumulation type, each `count` elements; nullptr for what is absent or not wanted. Outputs may be
// inputs of the same name or of another: every element is read before it is written.
template <typename Acc>
struct ResidualRow {
  const Acc *logits, *target, *multiplier = nullptr, *skip_input = nullptr;
  Acc *residual = nullptr, *delta = nullptr, *q = nullptr;
};

template <typename Acc>
struct ResidualNumbers {
  Acc rho, skip, dual_step, kappa;
};

// One vector of n elements at i; returns the energies of the elements, 0 beyond n.
template <typename Activation, typename HiddenLoss, typename Acc>
inline at::vec::Vectorized<Acc> residual_vector(
    const ResidualRow<Acc>& row, const ResidualNumbers<Acc>& numbers, int64_t i, int64_t n) {
  using Vec = at::vec::Vectorized<Acc>;
  const auto f = Activation::at(Vec::loadu(row.logits + i, n));
  Vec prediction = f.value;
  if (numbers.skip != 0) {
    prediction = at::vec::fmadd(Vec(numbers.skip), Vec::loadu(row.skip_input + i, n), prediction);
  }
  const Vec e = Vec::loadu(row.target + i, n) - prediction;
  const auto loss = HiddenLoss::at(e, Vec(numbers.kappa));
  Vec q = Vec(numbers.rho) * loss.slope, energy = Vec(numbers.rho) * loss.value;
  if (row.multiplier != nullptr || numbers.dual_step != 0) {
    Vec lambda = Vec(numbers.dual_step) * e;
    if (row.multiplier != nullptr) {
      const Vec before = Vec::loadu(row.multiplier + i, n);
      lambda = numbers.dual_step == 0 ? before : before + lambda;
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

// The energy of the run.
template <typename Activation, typename HiddenLoss, typename Acc>
inline Acc residual_row(const ResidualRow<Acc>& row, const ResidualNumbers<Acc>& numbers, int64_t count) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t V = Vec::size();
  Vec energy(Acc(0));
  int64_t i = 0;
  for (; i + V <= count; i += V) {
    energy = energy + residual_vector<Activation, HiddenLoss>(row, numbers, i, V);
  }
  if (i < count) { // what lies beyond the end is loaded as 0, whose energy need not be 0
    const Vec last = residual_vector<Activation, HiddenLoss>(row, numbers, i, count - i);
    energy = energy + first_lanes(count - i, last, Vec(Acc(0)));
  }
  return sum_of_lanes(energy);
}

// What stands around a layer's logits, as stacks (T, n, d); absent or not wanted where their data is null.
struct ResidualStacks {
  Stack target, multiplier, skip_input; // in
  Stack residual, delta, q;             // out
};

// The energy of units [first, first + count) of one sample of one layer, from their logits in the accumulation type.
template <typename Activation, typename Loss, typename Acc>
inline Acc residual_run(
    const ResidualStacks& stacks, const LayerOptions& o, const HiddenLoss& hidden_loss, const Acc* logits,
    int64_t layer, int64_t sample, int64_t first, int64_t count) {
  const auto input = [&](const Stack& stack, Scratch slot) {
    return read_run<Acc>(stack, layer, sample, first, count, slot);
  };
  const auto output = [&](const Stack& stack, Scratch slot) {
    return OutputRun<Acc>(stack, layer, sample, first, count, slot);
  };
  const auto residual = output(stacks.residual, Scratch::Residual), delta = output(stacks.delta, Scratch::Delta),
             q = output(stacks.q, Scratch::Q);
  ResidualRow<Acc> row;
  row.logits = logits;
  row.target = input(stacks.target, Scratch::Target);
  row.multiplier = input(stacks.multiplier, Scratch::Multiplier);
  row.skip_input = o.skip == 0 ? nullptr : input(stacks.skip_input, Scratch::SkipInput);
  row.residual = residual.data;
  row.delta = delta.data;
  row.q = q.data;
  const ResidualNumbers<Acc> numbers{
      static_cast<Acc>(o.rho), static_cast<Acc>(o.skip), static_cast<Acc>(o.dual_step),
      static_cast<Acc>(hidden_loss.kappa)};
  const Acc energy = residual_row<Activation, Loss>(row, numbers, count);
  residual.finish();
  delta.finish();
  q.finish();
  return energy;
}

// The energies (T,) of layers from those of their samples, one after the other: no sum depends on the threads or on T.
template <typename Acc>
inline void sum_row_energies(const double* row_energy, int64_t n_layers, int64_t n_samples, Acc* energy) {
  for (int64_t layer = 0; layer < n_layers; ++layer) {
    double sum = 0;
    for (int64_t i = 0; i < n_samples; ++i) {
      sum += row_energy[layer * n_samples + i];
    }
    energy[layer] = static_cast<Acc>(sum);
  }
}

} // namespace CPU_CAPABILITY
} // namespace lgd
