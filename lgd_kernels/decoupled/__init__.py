"""Layer-wise gradient decoupling: nets whose hidden values are variables of their own, one row per sample.

decoupled_step.py    one visit of a minibatch, in place and in one call
captured_step.py     the same as a CUDA graph
optimizer_state.py   the state of a torch.optim optimizer as that call takes it
memory.py            whether tensors share memory
residual_net.py      a residual net as stacks of equal layers: fed forward, judged layer by layer, or visited
hidden_gradient.py   the gradient of the energy in the hidden values
step_size.py         the curvature of the energy in the hidden values, which sets the size of their steps
"""

from lgd_kernels.decoupled.captured_step import CapturedStep, capture_step
from lgd_kernels.decoupled.decoupled_step import decoupled_step_
from lgd_kernels.decoupled.hidden_gradient import gradient_of_hidden
from lgd_kernels.decoupled.residual_net import Batch, LinearStack, ResidualNet
from lgd_kernels.decoupled.step_size import largest_curvature

__all__ = [
    "Batch",
    "CapturedStep",
    "LinearStack",
    "ResidualNet",
    "capture_step",
    "decoupled_step_",
    "gradient_of_hidden",
    "largest_curvature",
]
