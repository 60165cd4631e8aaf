"""The loss functions and modules, one file per op: what users call, with the checks of their arguments."""

from lgd_kernels.losses.softmax_infogain import SoftmaxInfogainLoss, softmax_infogain_loss

__all__ = ["SoftmaxInfogainLoss", "softmax_infogain_loss"]
