"""Layer-wise gradient decoupling: nets whose hidden values are variables of their own, one row per sample.

residual_net.py   a residual net as stacks of equal layers, fed forward or judged layer by layer
visit.py          one visit of a minibatch: steps of the hidden values and multipliers, then gradients of the weights
step_size.py      the curvature of the energy in the hidden values, which sets the size of their steps
"""

from lgd_kernels.decoupled.residual_net import LinearStack, ResidualNet
from lgd_kernels.decoupled.step import decoupled_step_
from lgd_kernels.decoupled.step_size import largest_curvature
from lgd_kernels.decoupled.visit import Batch, gradient_of_hidden, visit_

__all__ = [
    "Batch",
    "LinearStack",
    "ResidualNet",
    "decoupled_step_",
    "gradient_of_hidden",
    "largest_curvature",
    "visit_",
]
