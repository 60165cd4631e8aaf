// The CUDA kernel of local_residual on raw device pointers. The mathematics is in
// lgd_kernels/reference/local_residual.py.
//
// Started on `stream` (a cudaStream_t); allocates nothing and waits for nothing. All tensors of a call have the dtype
// of the logits, and each of them the same row stride in every layer. A layer's bits depend on its shape and on whether
// its rows lie one behind the other.
#pragma once

#include <cstdint>

#include "../common/local_residual.h"
#include "local_residual_config.h"

namespace lgd::gpu {

// The energies of tiles, doubles, that a call needs working space for.
template <typename Acc>
int64_t count_tile_energies(const LocalResidual<Acc>& io);

// Returns a cudaError_t.
template <typename Acc>
int local_residual(const LocalResidual<Acc>& io, void* stream);

} // namespace lgd::gpu
