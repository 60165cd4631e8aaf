// Kernels that are wrong on purpose, for the test of cuda_on_host.h itself.
#pragma once

#include "../../csrc/cuda/primitives.cuh"

namespace misuse {

using namespace lgd::gpu;

// result[i] = i for 64 threads, by way of shared memory.
template <int which>
__global__ void kernel(float* result) {
  float* const values = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x, mirrored = 63 - i;
  if (which == 1 && i == 5) {
    return; // skips the barrier
  }
  values[which == 2 ? i + 1 : i] = static_cast<float>(i); // 2: beyond the end
  if (which != 3) {                                       // 3: without a barrier
    block_sync();
  }
  float value = values[which == 2 ? i + 1 : mirrored];
  if (which == 4) { // a shuffle that names a lane which does not come
    value = i % 2 == 0 ? shuffle_xor(kAllLanes, value, 2) : value;
  }
  if (which == 5) { // a vote whose mask does not name the caller
    value += static_cast<float>(ballot(2u, true));
  }
  if (which == 6) { // a shuffle that reads a lane outside its mask
    value = shuffle_xor(1u << i % 32, value, 1);
  }
  if (which == 7) { // a cluster barrier that one block skips
    if (blockIdx.x == 0) {
      cluster_sync();
    }
  }
  if (which == 8 && i == 7) { // an output that nobody writes
    return;
  }
  result[which == 2 ? i : mirrored] = value;
}

template <int which>
int run_one(float* result) {
  const Grid grid = {which == 7 ? 2 : 1, 64, 1, which == 7 ? 2 : 1, 64 * sizeof(float)};
  return launch<kernel<which>>(grid, nullptr, result);
}

inline int run(int which, float* result) {
  int (*const runs[])(float*) = {run_one<0>, run_one<1>, run_one<2>, run_one<3>, run_one<4>,
                                 run_one<5>, run_one<6>, run_one<7>, run_one<8>};
  return runs[which](result);
}

} // namespace misuse
