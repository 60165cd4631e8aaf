// count_labels: one block does it all, or a cluster of eight. 512 KB of labels for 65,536 rows are little for a launch
// and much for one multiprocessor.

#include "count_labels.h"

#include "softmax_infogain_config.h"
#include "teams.cuh"

namespace lgd::gpu {
namespace {

template <typename Acc>
__global__ void __launch_bounds__(kMostThreads, 1) count_labels_kernel(
    int64_t rows, int64_t inner, const __grid_constant__ PerRow<const int64_t> labels, int64_t ignore_index, Acc* count,
    Acc* reciprocal, int blocks) {
  Block<double> team(reinterpret_cast<double*>(shared_memory()), blocks); // exact beyond 2^24 labels
  const int block = blocks > 1 ? cluster_rank() : 0;
  double counted[1] = {0};
#pragma unroll 4
  for (int64_t row = block * kMostThreads + team.rank; row < rows; row += blocks * kMostThreads) {
    const int64_t label = inner == 1 ? labels.at(row, 0) : labels.at(row / inner, row % inner);
    counted[0] += label == ignore_index ? 0 : 1;
  }
  team.reduce(counted, Sum{});
  if (block == 0 && team.rank == 0) {
    *count = static_cast<Acc>(counted[0]);
    *reciprocal = 1 / *count;
  }
}

} // namespace

template <typename Acc>
int count_labels(
    int64_t outer, int64_t inner, PerRow<const int64_t> labels, int64_t ignore_index, Acc* count, Acc* reciprocal,
    int compute_capability, void* stream) {
  const int blocks = compute_capability < 90 ? 1 : kMostBlocks;
  const Grid grid = {blocks, kMostThreads, 1, blocks, Block<double>::scratch_bytes(kMostThreads, blocks)};
  return launch<count_labels_kernel<Acc>>(
      grid, stream, outer * inner, inner, labels, ignore_index, count, reciprocal, blocks);
}

template int count_labels(int64_t, int64_t, PerRow<const int64_t>, int64_t, float*, float*, int, void*);
template int count_labels(int64_t, int64_t, PerRow<const int64_t>, int64_t, double*, double*, int, void*);

} // namespace lgd::gpu
