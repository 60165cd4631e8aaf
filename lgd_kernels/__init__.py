"""Fused kernels for the softmax-with-infogain loss and for layer-wise gradient decoupling."""

from lgd_kernels import diagnostics
from lgd_kernels.backends import show_backends
from lgd_kernels.decoupled import ActivationStore, DecoupledNetwork, capture_step, decoupled_step_, fit
from lgd_kernels.infogain import Infogain
from lgd_kernels.losses import SoftmaxInfogainLoss, decoupled_linear_loss, local_residual_loss, softmax_infogain_loss

__version__ = "0.1.0"
__all__ = [
    "ActivationStore",
    "DecoupledNetwork",
    "Infogain",
    "SoftmaxInfogainLoss",
    "capture_step",
    "decoupled_linear_loss",
    "decoupled_step_",
    "diagnostics",
    "fit",
    "local_residual_loss",
    "show_backends",
    "softmax_infogain_loss",
]
