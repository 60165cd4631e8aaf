"""Layer-wise gradient decoupling: nets whose hidden values are variables of their own, one row per sample.

network.py           DecoupledNetwork: a net of any modules, ordinary to evaluate, trained all layers at once
layers.py            how its modules are cut into layers, and which of them the fused ops know
linear_block.py      the residual layer that they know, and the net that is made of it
energy.py            the energy at given hidden values and its gradients, whatever the layers are made of
step_size.py         the curvature of the energy in the hidden values, which sets the size of their steps
modes.py             ways to train: what is kept from one visit to the next, and the numbers of each epoch
decoupled_step.py    one visit of a minibatch of a net of linear layers, in place and in one call
optimizer_state.py   the state of a torch.optim optimizer as that call takes it
memory.py            whether tensors share memory
"""

from lgd_kernels.decoupled.decoupled_step import decoupled_step_
from lgd_kernels.decoupled.linear_block import LinearBlock, residual_net
from lgd_kernels.decoupled.modes import Backpropagation, EpochNumbers, Mode, ReinitializedValues, StoredValues
from lgd_kernels.decoupled.network import DecoupledNetwork, Visit

__all__ = [
    "Backpropagation",
    "DecoupledNetwork",
    "EpochNumbers",
    "LinearBlock",
    "Mode",
    "ReinitializedValues",
    "StoredValues",
    "Visit",
    "decoupled_step_",
    "residual_net",
]
