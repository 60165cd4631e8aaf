// The CUDA kernels of decoupled_linear for layers that are at most kMostWidth wide, on raw device pointers. The
// mathematics is in lgd_kernels/reference/decoupled_linear.py.
//
// Each function starts its kernels on `stream` (a cudaStream_t), allocates nothing, waits for nothing and returns a
// cudaError_t. Layers of equal shapes, strides and wishes share a launch, whatever their activations and numbers, and
// whether they are parts of one tensor or not. Results are the same in every run, and a layer's bits depend on the
// layer alone. Acc, the accumulation type, is double for float64 z and float otherwise.
#pragma once

#include <cstdint>

#include "../common/layers.h"
#include "decoupled_linear_config.h"

namespace lgd::gpu {

// a = branch_scale * phi(z) W^T + b. The weight and the bias have the dtype of z or, where that is float32, bfloat16 or
// float16; the others that of z.
struct LinearLayer {
  int64_t n_samples = 0;
  int d_in = 0, d_out = 0;
  bool preactivation = false; // whether the activation is phi; else it is f, which follows the raw logits
  LayerOptions options;
  Matrix z;      // (n, d_in)
  Matrix weight; // (d_out, d_in)
  Matrix bias;   // (1, d_out), or absent
};

struct DecoupledLinearLayer {
  LinearLayer linear;
  ResidualIo io;
};

template <typename Acc>
struct DecoupledLinear {
  const DecoupledLinearLayer* layers = nullptr;
  int64_t n_layers = 0;
  HiddenLoss hidden_loss;
  bool tf32 = false;             // whether products of float32 may be rounded to TF32
  Acc* energy = nullptr;         // (T,), out
  double* tile_energy = nullptr; // working space
};

// The doubles that `tile_energy` has to have room for.
template <typename Acc>
int64_t count_tile_energies(const DecoupledLinear<Acc>& io);

template <typename Acc>
int decoupled_linear(const DecoupledLinear<Acc>& io, void* stream);

// Outputs whose data is null are not wanted, and what only they need may be absent. The gradients of the weight and the
// bias are contiguous and have the weight's dtype.
template <typename Acc>
struct DecoupledLinearBackwardLayer {
  LinearLayer linear;
  Matrix delta, q;               // (n, d_out)
  const Acc* upstream = nullptr; // the gradient of the layer's energy; 1 where it is null
  Matrix grad_z, grad_weight;    // out
  Matrix grad_bias;              // out, (1, d_out)
};

template <typename Acc>
struct DecoupledLinearBackward {
  const DecoupledLinearBackwardLayer<Acc>* layers = nullptr;
  int64_t n_layers = 0;
  bool tf32 = false;
  Acc* parts = nullptr; // working space
};

// The numbers that `parts` has to have room for.
template <typename Acc>
int64_t count_parts(const DecoupledLinearBackward<Acc>& io);

template <typename Acc>
int decoupled_linear_backward(const DecoupledLinearBackward<Acc>& io, void* stream);

} // namespace lgd::gpu
