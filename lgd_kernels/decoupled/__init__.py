"""Layer-wise gradient decoupling: nets whose hidden values are variables of their own, one row per sample.

network.py           DecoupledNetwork: a net of any modules, ordinary to evaluate, trained all layers at once
layers.py            how its modules are cut into layers, and which of them the fused ops know
linear_block.py      the residual layer that they know, and the net that is made of it
energy.py            the energy at given hidden values and its gradients, whatever the layers are made of
step_size.py         the curvature of the energy in the hidden values, which sets the size of their steps
modes.py             ways to train: what is kept from one visit to the next, and the numbers of each epoch
decoupled_step.py    one visit of a minibatch of a net of linear layers, in place and in one call
captured_step.py     the same as a CUDA graph
optimizer_state.py   the state of a torch.optim optimizer as that call takes it
memory.py            whether tensors share memory

training_loop.py     fit
training.py          all that changes in it, minibatch by minibatch, and how it is saved
store.py             the hidden values and multipliers of a whole data set
data.py              minibatches in an order that can be repeated
history.py           what happened in every epoch
checkpoint.py        the last few checkpoints of a run
files.py             files that are there whole or not at all

Not imported here, because torch.distributed takes its time and is not in every build of torch:

distributed.py            DistributedNetwork: a block of the layers and a shard of the samples, on each of many ranks
blocks.py                 how the layers are cut into blocks
neighbours.py             layer_data_mesh, and what the ranks tell each other
distributed_training.py   what fit does differently for such a net
sharded_checkpoint.py     ShardedCheckpoints, which any other mesh of ranks can read
"""

from lgd_kernels.decoupled.captured_step import CapturedStep, capture_step
from lgd_kernels.decoupled.checkpoint import Checkpoints
from lgd_kernels.decoupled.decoupled_step import decoupled_step_
from lgd_kernels.decoupled.history import History
from lgd_kernels.decoupled.linear_block import LinearBlock, parameter_groups, residual_net
from lgd_kernels.decoupled.modes import Backpropagation, EpochNumbers, Mode, ReinitializedValues, StoredValues
from lgd_kernels.decoupled.network import DecoupledNetwork, Visit
from lgd_kernels.decoupled.store import ActivationStore, StoredBatch
from lgd_kernels.decoupled.training import Training
from lgd_kernels.decoupled.training_loop import Callback, fit

__all__ = [
    "ActivationStore",
    "Backpropagation",
    "Callback",
    "CapturedStep",
    "Checkpoints",
    "DecoupledNetwork",
    "EpochNumbers",
    "History",
    "LinearBlock",
    "Mode",
    "ReinitializedValues",
    "StoredBatch",
    "StoredValues",
    "Training",
    "Visit",
    "capture_step",
    "decoupled_step_",
    "fit",
    "parameter_groups",
    "residual_net",
]
