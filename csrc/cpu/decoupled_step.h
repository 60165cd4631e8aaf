// The CPU kernel of decoupled_step_ on raw pointers. The mathematics is in lgd_kernels/reference/decoupled_step.py.
#pragma once

#include <cstdint>

#include "decoupled_linear.h"
#include "softmax_infogain.h"

namespace lgd {

// The numbers of an optimizer's step; see csrc/common/optimizers.h.
struct Update {
  double lr = 0, momentum = 0, second_momentum = 0, epsilon = 0, l2 = 0, decay = 1, root = 1;
};

// A weight (d_out, d_in) or bias (1, d_out) with the buffers that the rule needs, all in Acc.
struct Parameter {
  Matrix value, first, second;
  Update update;
};

struct StepLayer {
  LinearLayer linear;            // with the dual step of the target's multiplier
  ResidualIo io;                 // new_multiplier: where it has one; residual: where it is wanted
  Matrix q_of_input;             // the io.q of the layer below, in Acc; absent for the first layer
  Matrix velocity;               // of z, (n, d_in); absent if there is none
  Parameter weight, bias;        // bias.value is absent if there is none
  double* tile_energy = nullptr; // working space
};

// What the last layer's raw logits are judged by: softmax_infogain, or as a residual if `logits` is absent.
template <typename Acc>
struct Head {
  Matrix logits;                  // working space, (n, C), in Acc
  SoftmaxInfogainInput<Acc> rows; // of `logits`; every label is a good one
  Acc* loss = nullptr;            // working space, (n,)
};

template <typename Acc>
struct DecoupledStep {
  const StepLayer* layers = nullptr;
  int64_t n_layers = 0;
  HiddenLoss hidden_loss;
  Head<Acc> head;
  int64_t update_rule = 0; // a position in lgd_kernels.reference.UPDATE_RULES
  int64_t steps = 0;
  double step_size = 0, momentum = 0;
  Acc* energy = nullptr; // (T,), out
};

#define LGD_DECLARE_DECOUPLED_STEP                  \
  void decoupled_step(const DecoupledStep<float>&); \
  void decoupled_step(const DecoupledStep<double>&);

#ifndef CPU_CAPABILITY // the glue; the vector code defines one of them, in an inline namespace
namespace DEFAULT {
LGD_DECLARE_DECOUPLED_STEP
}
namespace AVX2 {
LGD_DECLARE_DECOUPLED_STEP
}
namespace AVX512 {
LGD_DECLARE_DECOUPLED_STEP
}
#endif

#undef LGD_DECLARE_DECOUPLED_STEP

} // namespace lgd
