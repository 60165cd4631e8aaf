"""Every operation in plain PyTorch: the specification that the kernels are tested against.

Slow and obvious on purpose. Each function has the signature of the op of the same name in `ops.py`, so that it also
serves as the implementation where no kernel is built.
"""

from lgd_kernels.reference.activations import ACTIVATIONS, HIDDEN_LOSSES
from lgd_kernels.reference.decoupled_linear import (
    decoupled_linear,
    decoupled_linear_backward,
    decoupled_linear_tangent,
)
from lgd_kernels.reference.decoupled_step import UPDATE_RULES, UpdateNumbers, decoupled_step_
from lgd_kernels.reference.local_residual import local_residual, local_residual_tangent
from lgd_kernels.reference.softmax_infogain import (
    SoftmaxInfogainTerms,
    accumulation_dtype,
    check_labels,
    count_labels,
    infogain_rows,
    second_derivative,
    softmax_infogain,
    softmax_infogain_backward,
    softmax_infogain_backward_,
    softmax_infogain_backward_matrix,
    softmax_infogain_double_backward,
    softmax_infogain_reduced,
)

__all__ = [
    "ACTIVATIONS",
    "HIDDEN_LOSSES",
    "UPDATE_RULES",
    "SoftmaxInfogainTerms",
    "UpdateNumbers",
    "accumulation_dtype",
    "check_labels",
    "count_labels",
    "decoupled_linear",
    "decoupled_linear_backward",
    "decoupled_linear_tangent",
    "decoupled_step_",
    "infogain_rows",
    "local_residual",
    "local_residual_tangent",
    "second_derivative",
    "softmax_infogain",
    "softmax_infogain_backward",
    "softmax_infogain_backward_",
    "softmax_infogain_backward_matrix",
    "softmax_infogain_double_backward",
    "softmax_infogain_reduced",
]
