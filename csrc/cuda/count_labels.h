// How many labels count, for the mean of softmax_infogain, in one launch: as operations on tensors these are four, and
// at (65536, 10) launches are all the time there is.
//
// As in softmax_infogain.h: on raw device pointers, started on `stream`, nothing allocated, a cudaError_t returned.
// There may be no labels.
#pragma once

#include <cstdint>

#include "../common/views.h"

namespace lgd::gpu {

// *count = how many labels are not ignored, *reciprocal = 1 / *count.
template <typename Acc>
int count_labels(
    int64_t outer, int64_t inner, PerRow<const int64_t> labels, int64_t ignore_index, Acc* count, Acc* reciprocal,
    int compute_capability, void* stream);

} // namespace lgd::gpu
