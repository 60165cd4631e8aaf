// The pieces that the Python module `_C` is made of.
#pragma once

#include <torch/csrc/utils/pybind.h> // not torch/extension.h, which takes 20 seconds more to read

#include "torch/common.h"

// H's parts, as every function takes them that has an H.
#define LGD_H_PARAMETERS                                                                          \
  const OptionalTensor &matrix, const OptionalTensor &background, const OptionalTensor &diagonal, \
      const OptionalTensor &crow, const OptionalTensor &col, const OptionalTensor &values

namespace lgd {

void bind_softmax_infogain(pybind11::module_& m);
void bind_layers(pybind11::module_& m); // but for decoupled_step_, which is for the CPU alone

} // namespace lgd
