"""Layer-wise gradient decoupling: nets whose hidden values are variables of their own, one row per sample.

decoupled_step.py    one visit of a minibatch, in place and in one call
optimizer_state.py   the state of a torch.optim optimizer as that call takes it
memory.py            whether tensors share memory
residual_net.py      a residual net as stacks of equal layers: fed forward, judged layer by layer, or visited
hidden_gradient.py   the gradient of the energy in the hidden values
store.py             the hidden values and multipliers of a whole data set
data.py              minibatches in an order that can be repeated
checkpoint.py        checkpoints of a training run
files.py             files that are there whole or not at all
step_size.py         the curvature of the energy in the hidden values, which sets the size of their steps
"""

from lgd_kernels.decoupled.checkpoint import Checkpoints
from lgd_kernels.decoupled.decoupled_step import decoupled_step_
from lgd_kernels.decoupled.hidden_gradient import gradient_of_hidden
from lgd_kernels.decoupled.residual_net import Batch, LinearStack, ResidualNet
from lgd_kernels.decoupled.step_size import largest_curvature
from lgd_kernels.decoupled.store import ActivationStore, StoredBatch

__all__ = [
    "ActivationStore",
    "Batch",
    "Checkpoints",
    "LinearStack",
    "ResidualNet",
    "StoredBatch",
    "decoupled_step_",
    "gradient_of_hidden",
    "largest_curvature",
]
