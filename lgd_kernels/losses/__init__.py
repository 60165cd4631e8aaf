"""The loss functions and modules, one file per op: what users call, with the checks of their arguments."""

from lgd_kernels.losses.decoupled_linear import decoupled_linear_loss
from lgd_kernels.losses.local_residual import local_residual_loss
from lgd_kernels.losses.softmax_infogain import SoftmaxInfogainLoss, softmax_infogain_loss

__all__ = ["SoftmaxInfogainLoss", "decoupled_linear_loss", "local_residual_loss", "softmax_infogain_loss"]
