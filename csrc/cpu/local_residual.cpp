// local_residual for one instruction set; compiled once for each.

#include "local_residual.h"

#include "../common/activations.h"
#include "parallel.h"
#include "residual_row.h"
#include "stack_rows.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384; // elements that are worth a thread
constexpr int64_t kRun = 2048;    // units of a row at a time: seven runs of float fit a 64 KB L1 cache, or nearly

template <typename Activation, typename Loss, typename Acc>
double sample_energy(const LocalResidual<Acc>& io, int64_t layer, int64_t sample) {
  const LayerOptions& o = io.options[layer];
  const ResidualStacks stacks{io.target, io.multiplier, io.skip_input, io.residual, io.delta, io.q};
  double energy = 0;
  for (int64_t first = 0; first < io.n_units; first += kRun) {
    const int64_t count = io.n_units - first < kRun ? io.n_units - first : kRun;
    const Acc* logits = read_run<Acc>(io.logits, layer, sample, first, count, Scratch::Logits);
    energy += residual_run<Activation, Loss>(stacks, o, io.hidden_loss, logits, layer, sample, first, count);
  }
  return energy;
}

template <typename Acc>
void run(const LocalResidual<Acc>& io) {
  const int64_t n = io.n_samples;
  const auto samples = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t layer = i / n, end_of_layer = (layer + 1) * n < end ? (layer + 1) * n : end;
      with_activation(io.options[layer].activation, [&](auto activation) {
        with_hidden_loss(io.hidden_loss.code, [&](auto loss) {
          for (; i < end_of_layer; ++i) {
            io.row_energy[i] = sample_energy<decltype(activation), decltype(loss)>(io, layer, i % n);
          }
        });
      });
    }
  };
  parallel_for(0, io.n_layers * n, kGrain / (io.n_units + 1) + 1, samples);
  sum_row_energies(io.row_energy, io.n_layers, n, io.energy);
}

} // namespace

void local_residual(const LocalResidual<float>& io) {
  run(io);
}
void local_residual(const LocalResidual<double>& io) {
  run(io);
}

} // namespace CPU_CAPABILITY
} // namespace lgd
