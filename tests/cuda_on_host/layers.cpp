// The kernels of csrc/cuda over layers compiled for the host, behind functions that Python's ctypes can call. The
// structs are those of csrc/common; layers.py has them in Python.

#include "cuda_on_host.h"

#include "../../csrc/cuda/decoupled_linear.cu"
#include "../../csrc/cuda/decoupled_linear_backward.cu"
#include "../../csrc/cuda/layers.cu"
#include "../../csrc/cuda/local_residual.cu"

using namespace lgd;

namespace {

template <typename Acc>
LocalResidual<Acc> call_of(
    const ResidualLayer* layers, int64_t n_layers, const HiddenLoss& loss, void* energy, double* tiles) {
  return {layers, n_layers, loss, static_cast<Acc*>(energy), tiles};
}

template <typename Acc>
gpu::DecoupledLinear<Acc> call_of(
    const gpu::DecoupledLinearLayer* layers, int64_t n_layers, const HiddenLoss& loss, bool tf32, void* energy,
    double* tiles) {
  return {layers, n_layers, loss, tf32, static_cast<Acc*>(energy), tiles};
}

template <typename Acc>
gpu::DecoupledLinearBackward<Acc> call_of(const void* layers, int64_t n_layers, bool tf32, void* parts) {
  return {static_cast<const gpu::DecoupledLinearBackwardLayer<Acc>*>(layers), n_layers, tf32, static_cast<Acc*>(parts)};
}

} // namespace

extern "C" {

// The number of tile energies that a call needs room for.
int64_t local_residual_tiles(const ResidualLayer* layers, int64_t n_layers) {
  return gpu::count_tile_energies(call_of<float>(layers, n_layers, {}, nullptr, nullptr));
}

int local_residual(
    const ResidualLayer* layers, int64_t n_layers, const HiddenLoss& loss, bool in_double, void* energy,
    double* tile_energy) {
  return in_double ? gpu::local_residual(call_of<double>(layers, n_layers, loss, energy, tile_energy), nullptr)
                   : gpu::local_residual(call_of<float>(layers, n_layers, loss, energy, tile_energy), nullptr);
}

int64_t decoupled_linear_tiles(const gpu::DecoupledLinearLayer* layers, int64_t n_layers, bool in_double, bool tf32) {
  return in_double ? gpu::count_tile_energies(call_of<double>(layers, n_layers, {}, tf32, nullptr, nullptr))
                   : gpu::count_tile_energies(call_of<float>(layers, n_layers, {}, tf32, nullptr, nullptr));
}

int decoupled_linear(
    const gpu::DecoupledLinearLayer* layers, int64_t n_layers, const HiddenLoss& loss, bool in_double, bool tf32,
    void* energy, double* tiles) {
  return in_double ? gpu::decoupled_linear(call_of<double>(layers, n_layers, loss, tf32, energy, tiles), nullptr)
                   : gpu::decoupled_linear(call_of<float>(layers, n_layers, loss, tf32, energy, tiles), nullptr);
}

// The numbers, doubles or floats, that a call needs room for.
int64_t decoupled_linear_backward_parts(const void* layers, int64_t n_layers, bool in_double, bool tf32) {
  return in_double ? gpu::count_parts(call_of<double>(layers, n_layers, tf32, nullptr))
                   : gpu::count_parts(call_of<float>(layers, n_layers, tf32, nullptr));
}

int decoupled_linear_backward(const void* layers, int64_t n_layers, bool in_double, bool tf32, void* parts) {
  return in_double ? gpu::decoupled_linear_backward(call_of<double>(layers, n_layers, tf32, parts), nullptr)
                   : gpu::decoupled_linear_backward(call_of<float>(layers, n_layers, tf32, parts), nullptr);
}

// How a layer is cut, as numbers in the order of the struct.
void forward_cut(int64_t n_samples, int d_in, int d_out, int operand_size, int accumulated_size, int64_t* numbers) {
  const gpu::ForwardCut c = gpu::forward_cut({n_samples, d_in, d_out, operand_size, accumulated_size});
  const int64_t values[] = {c.row_tiles, c.panels, c.width, c.stride, c.weight_bytes, c.tile_bytes};
  std::copy(std::begin(values), std::end(values), numbers);
}

void backward_cut(
    int64_t n_samples, int d_in, int d_out, int operand_size, int accumulated_size, bool need_weight,
    int64_t* numbers) {
  const gpu::LinearShape shape = {n_samples, d_in, d_out, operand_size, accumulated_size};
  const gpu::BackwardCut c = gpu::backward_cut(shape, need_weight);
  const int64_t values[] = {c.row_tiles, c.tiles_of_chunk,  c.chunks,       c.panels,      c.width,
                            c.stride,    c.stride_of_delta, c.weight_bytes, c.delta_bytes, c.tile_bytes};
  std::copy(std::begin(values), std::end(values), numbers);
}

void residual_cut(int64_t n_samples, int64_t n_units, bool packed, int element_size, int64_t* numbers) {
  const gpu::ResidualCut c = gpu::residual_cut(n_samples, n_units, packed, element_size);
  const int64_t values[] = {c.rows, c.columns, c.groups_of_row, c.blocks};
  std::copy(std::begin(values), std::end(values), numbers);
}

} // extern "C"
