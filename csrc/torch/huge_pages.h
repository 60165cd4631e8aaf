// Memory for large results.
#pragma once

#include <ATen/core/Tensor.h>

namespace lgd {

// An uninitialized tensor with the shape and strides of `like`. From 8 MB on it lies on huge pages of its own, and when
// it is freed, up to 256 MB are kept for the next call: the kernel's page faults cost more than our kernels (a gradient
// of 33 MB: 1.6 ms into memory that is there, 3.2 into fresh huge pages, 17 into fresh small ones).
at::Tensor empty_on_huge_pages(const at::Tensor& like);

} // namespace lgd
