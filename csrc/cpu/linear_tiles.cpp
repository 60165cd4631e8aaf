// What linear_tiles.h only declares, for one instruction set; compiled once for each.

#include "linear_tiles.h"

namespace lgd {
inline namespace CPU_CAPABILITY {

template <typename Acc>
void fill_operand(const LinearLayer& l, int64_t begin, int64_t end) {
  using Vec = Vectorized<Acc>;
  if (l.operand.data == l.z.data) {
    return;
  }
  with_activation(phi_of(l), [&](auto phi) {
    for (int64_t sample = begin; sample < end; ++sample) {
      const Tile tile{sample, 1, 0, l.d_in};
      const auto z = read_tile<Acc>(l.z, tile, Scratch::SkipInput);
      const OutputTile<Acc> operand(l.operand, tile, Scratch::Residual);
      for_vectors<Acc>(l.d_in, [&](int64_t i, int64_t n) {
        decltype(phi)::at(Vec::loadu(z.data + i, n)).value.store(operand.view.data + i, n);
      });
      operand.finish();
      if (l.operand_dtype != l.operand.dtype) {
        const Row rounded{
            scratch_of<char>(Scratch::Vector, l.d_in * element_size(l.operand_dtype)), l.operand_dtype, 1};
        store_row(operand.view.data, rounded, 0, l.d_in);
        load_row({rounded.data, rounded.dtype, 1}, 0, l.d_in, operand.view.data); // back: the dtypes differ
      }
    }
  });
}

template <typename Acc>
void judge(
    const LinearLayer& l, const ResidualIo& io, const HiddenLoss& hidden_loss, int64_t begin, int64_t end,
    double* tile_energy) {
  const int64_t panels = tiles_of(l.d_out, kPanel);
  for_tiles_of_logits<Acc>(l, begin, end, [&](const Tile& tile, const auto& logits) {
    const double energy = residual_tile<Acc>(io, l.options, f_of(l), hidden_loss, tile, logits);
    tile_energy[tile.row / kRows * panels + tile.column / kPanel] = energy;
  });
}

#define LGD_INSTANTIATE(Acc)                                             \
  template void fill_operand<Acc>(const LinearLayer&, int64_t, int64_t); \
  template void judge<Acc>(const LinearLayer&, const ResidualIo&, const HiddenLoss&, int64_t, int64_t, double*);

LGD_INSTANTIATE(float)
LGD_INSTANTIATE(double)

} // namespace CPU_CAPABILITY
} // namespace lgd
