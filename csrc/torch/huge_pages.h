// Memory for large results.
#pragma once

#include <ATen/core/Tensor.h>

namespace lgd {

// An uninitialized tensor with the shape and strides of `like`. From 1 MB on it lies on huge pages of its own, and when
// it is freed, up to 256 MB are kept for the next call: page faults cost more than our kernels. At (65536, 10), 2.6 MB,
// a call with 672 faults took 1.5 ms where one without takes 0.6; at (8192, 1000), 33 MB, fresh memory added 1 to 40
// ms.
at::Tensor empty_on_huge_pages(const at::Tensor& like);

// The same, contiguous.
at::Tensor empty_on_huge_pages(at::IntArrayRef shape, at::ScalarType dtype);

} // namespace lgd
