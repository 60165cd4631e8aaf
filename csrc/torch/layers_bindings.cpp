#include "../bindings.h"
#include "decoupled_linear.h"
#include "local_residual.h"

void lgd::bind_layers(pybind11::module_& m) {
  using Release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("local_residual", &lgd::local_residual, Release());
  m.def("decoupled_linear", &lgd::decoupled_linear, Release());
  m.def("decoupled_linear_backward", &lgd::decoupled_linear_backward, Release());
}
