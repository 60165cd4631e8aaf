// How a layer of local_residual is cut into blocks: one pure function of its shape.
#pragma once

#include <cstdint>

namespace lgd::gpu {

constexpr int kResidualThreads = 256;
constexpr int kGroupsOfThread = 2; // of 16 bytes, of up to four tensors each: 128 bytes in flight

struct ResidualCut {
  int64_t rows = 0, columns = 0; // a layer whose rows lie one behind the other is one long row
  int64_t groups_of_row = 0;
  int64_t blocks = 0;
};

constexpr ResidualCut residual_cut(int64_t n_samples, int64_t n_units, bool packed, int64_t element_size) {
  ResidualCut cut;
  cut.rows = packed ? 1 : n_samples;
  cut.columns = packed ? n_samples * n_units : n_units;
  const int64_t per_group = 16 / element_size, of_block = kResidualThreads * kGroupsOfThread;
  cut.groups_of_row = (cut.columns + per_group - 1) / per_group;
  cut.blocks = (cut.rows * cut.groups_of_row + of_block - 1) / of_block;
  return cut;
}

} // namespace lgd::gpu
