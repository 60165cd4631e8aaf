// local_residual for one instruction set; compiled once for each.

#include "local_residual.h"

#include "parallel.h"
#include "residual_tile.h"

namespace lgd {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGrain = 16384; // elements that are worth a thread
constexpr int64_t kRun = 2048;    // elements at a time: seven such arrays of float fit a 64 KB L1 cache, or nearly

// The energy of samples [begin, end) of a layer.
template <typename Acc>
double samples_energy(const ResidualLayer& layer, const HiddenLoss& hidden_loss, int64_t begin, int64_t end) {
  double energy = 0;
  for (int64_t first = 0; first < layer.n_units; first += kRun) {
    const Tile tile{begin, end - begin, first, at_most(layer.n_units - first, kRun)};
    const auto logits = read_tile<Acc>(layer.logits, tile, Scratch::Logits);
    energy += residual_tile<Acc>(
        layer.io, layer.options, layer.options.activation, hidden_loss, tile,
        [&](int64_t i, int64_t j, int64_t n) { return Vectorized<Acc>::loadu(logits.row(i) + j, n); });
  }
  return energy;
}

template <typename Acc>
void run(const LocalResidual<Acc>& io) {
  if (io.n_layers == 0) {
    return;
  }
  const int64_t n = io.layers[0].n_samples, d = io.layers[0].n_units;
  const int64_t rows = at_most(kRun / (d + 1) + 1, kRows), tiles = tiles_of(n, rows);
  parallel_for(0, io.n_layers * tiles, kGrain / (rows * (d + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * rows;
      io.tile_energy[i] = samples_energy<Acc>(io.layers[i / tiles], io.hidden_loss, first, at_most(first + rows, n));
    }
  });
  for (int64_t t = 0; t < io.n_layers; ++t) {
    io.energy[t] = static_cast<Acc>(sum_in_order(io.tile_energy + t * tiles, tiles));
  }
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
