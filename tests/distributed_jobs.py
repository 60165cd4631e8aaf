"""A small training run, by one process or by the ranks of a mesh: see test_distributed.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from small_networks import NETS
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels.decoupled.distributed import DistributedNetwork
from lgd_kernels.decoupled.neighbours import layer_data_mesh

N, VISITS, BATCH_SIZE = 23, 10, 8
NUMBERS = {"step_size": 0.2, "steps": 3, "rho": 0.5}


class Run(NamedTuple):
    """What came of a run: of all layers, but of the samples of one shard."""

    energies: Tensor  # (visits, T)
    residual_norm: Tensor  # (visits, T - 1)
    value_norm: Tensor
    net: dict[str, Tensor]
    z: dict[int, Tensor]  # by t
    multiplier: dict[int, Tensor]
    shard: range


class Setting(NamedTuple):
    net: lgd.DecoupledNetwork
    x: Tensor
    labels: Tensor
    batches: list[Tensor]


def setting(name: str, dtype: torch.dtype) -> Setting:
    """The same numbers in every dtype: they are float32's."""
    torch.manual_seed(0)
    modules, shape = NETS[name]
    net = lgd.DecoupledNetwork(modules()).to(dtype)
    x, labels = torch.randn(N, *shape).to(dtype), torch.randint(3, (N,))
    return Setting(net, x, labels, [torch.randperm(N)[:BATCH_SIZE] for _ in range(VISITS)])


def train_alone(name: str, dtype: torch.dtype) -> Run:
    net, x, labels, batches = setting(name, dtype)
    values = net.hidden_values(x)
    return _train(net, x, labels, batches, values, range(N), 0, net.state_dict)


def train_together(name: str, dtype: torch.dtype, n_layer: int, n_data: int) -> Run:
    net, x, labels, batches = setting(name, dtype)
    mesh = layer_data_mesh(n_layer, n_data)
    if mesh.get_local_rank("data") > 0:  # takes over the parameters of the first shard
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
    part = DistributedNetwork(net, mesh, x[:2])
    shard = part.shard(N)
    x, labels = x[shard.start : shard.stop], labels[shard.start : shard.stop]
    batches = [batch[(batch >= shard.start) & (batch < shard.stop)] - shard.start for batch in batches]
    return _train(part, x, labels, batches, part.hidden_values(x), shard, part.block.start, part.full_state_dict)


def _train(net, x, labels, batches, values, shard, first, state_dict) -> Run:
    store = lgd.ActivationStore(len(x), [value.shape[1:] for value in values], dtype=x.dtype)
    everything = store.gather(torch.arange(len(x)))
    for z, value in zip(everything.z, values, strict=True):
        z.copy_(value)
    store.scatter(everything)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    visits = []
    for batch in batches:
        stored = store.gather(batch)
        numbers = {"multiplier": stored.multiplier, "optimizer": optimizer, **NUMBERS}
        visits.append(net.visit_(x[batch], stored.z, labels[batch], **numbers))
        store.scatter(stored)
    curves = [torch.stack(curve) for curve in zip(*visits, strict=True)]
    kept = [{first + 1 + i: value.clone() for i, value in enumerate(of)} for of in (store.z, store.multiplier)]
    return Run(*curves, state_dict(), *kept, shard)
