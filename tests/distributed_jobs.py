"""A small training run, by one process or by the ranks of a mesh: see test_distributed.py."""

from __future__ import annotations

import itertools
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from small_networks import NETS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import lgd_kernels as lgd
from lgd_kernels.decoupled import EpochNumbers, StoredValues, residual_net
from lgd_kernels.decoupled.distributed import DistributedNetwork
from lgd_kernels.decoupled.neighbours import Neighbours, layer_data_mesh
from lgd_kernels.decoupled.sharded_checkpoint import ShardedCheckpoints

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


def train_together(name: str, dtype: torch.dtype, n_layer: int, n_data: int, **options) -> Run:
    net, x, labels, batches = setting(name, dtype)
    mesh = layer_data_mesh(n_layer, n_data)
    if mesh.get_local_rank("data") > 0:  # takes over the parameters of the first shard
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
    part = DistributedNetwork(net, mesh, x[:2])
    shard = part.shard(N)
    x, labels = x[shard.start : shard.stop], labels[shard.start : shard.stop]
    batches = [batch[(batch >= shard.start) & (batch < shard.stop)] - shard.start for batch in batches]
    values, first = part.hidden_values(x), part.block.start
    return _train(part, x, labels, batches, values, shard, first, part.full_state_dict, **options)


def train_with_checkpoints(folder: Path, visits: int, *args) -> Run:
    """Go on from the last checkpoint, whose learning rate counts, and save one at the end."""
    options = {"lr": 1.0} if folder.exists() else {}
    return train_together(*args, visits=visits, checkpoints=ShardedCheckpoints(folder, keep=1), **options)


def die_in_training(victim: int, *args) -> Run:
    """The victim's process is killed in the third visit."""
    seen = itertools.count()

    def on_visit() -> None:
        if next(seen) == 2 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    return train_together(*args, on_visit=on_visit)


def gradient_and_curvature(n_layer: int, n_data: int) -> tuple[dict[int, Tensor], range, float]:
    """(dE/dz of what this rank stores, its shard, the largest curvature)."""
    net, x, labels, _ = setting("mixed", torch.float64)
    part = DistributedNetwork(net, layer_data_mesh(n_layer, n_data), x[:2])
    shard = part.shard(N)
    gradient, curvature = _gradient_and_curvature(part, x[shard.start : shard.stop], labels[shard.start : shard.stop])
    return {part.block.start + i: value for i, value in enumerate(gradient)}, shard, curvature


def gradient_and_curvature_alone() -> tuple[list[Tensor], float]:
    net, x, labels, _ = setting("mixed", torch.float64)
    return _gradient_and_curvature(net, x, labels)


def _gradient_and_curvature(net, x, labels) -> tuple[list[Tensor], float]:
    """A little away from the values of the net fed forward, where the mode has brought them."""
    mode, z = StoredValues(multipliers=False, burn_in=3), net.hidden_values(x)
    mode.burn_in_(net, x, labels, z, None, EpochNumbers(rho=0.5, step_size=0.2))
    gradient = net.hidden_gradient(x, z, labels, rho=0.5)
    return gradient, net.largest_curvature(x, z, labels, rho=0.5, iterations=60)


class Sent(NamedTuple):
    """Numbers (not bytes) that a rank handed over in a visit."""

    to_neighbours: int
    to_sums: list[int]  # one by one


def count_what_is_sent(n_layer: int, n_data: int, width: int, layers: int, samples: int, steps: int) -> Sent:
    """In a visit of a residual net with `layers` layers in each block."""
    to_neighbours, to_sums = [], []
    isend, all_reduce = dist.isend, dist.all_reduce
    net = lgd.DecoupledNetwork(residual_net(width, width, layers * n_layer - 1, 3))
    x, labels = torch.randn(samples, width), torch.randint(3, (samples,))
    part = DistributedNetwork(net, layer_data_mesh(n_layer, n_data), x)
    z = part.hidden_values(x)
    dist.isend = lambda tensor, **options: (to_neighbours.append(tensor.numel()), isend(tensor, **options))[1]
    dist.all_reduce = lambda tensor, **options: (to_sums.append(tensor.numel()), all_reduce(tensor, **options))[1]
    part.visit_(x, z, labels, step_size=0.1, steps=steps)
    return Sent(sum(to_neighbours), to_sums)


def let_wait(n_layer: int, n_data: int) -> str:
    """Rank 1 takes no part in what rank 0 wants to do; the error of rank 0."""
    neighbours = Neighbours(layer_data_mesh(n_layer, n_data, timeout=timedelta(seconds=0.3)))
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        store.wait(["rank 0 is done"], timedelta(seconds=60))
        return ""
    try:
        if neighbours.above:
            neighbours.receive(torch.empty(3), "z_1", 1).wait()
        else:
            neighbours.sum_over_data([torch.empty(3)], "the gradients")
    except RuntimeError as error:
        return str(error)
    finally:
        store.set("rank 0 is done", "")
    return "it did not wait"


def bad_arguments() -> list[str]:
    """The messages of two ranks that are asked for what they cannot do."""
    net, x, labels, _ = setting("linear", torch.float32)
    mesh = layer_data_mesh(2, 1)
    part = DistributedNetwork(net, mesh, x)
    z = part.hidden_values(x)
    shared = lgd.DecoupledNetwork([torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)])
    shared.layers[1][0].weight = shared.layers[0][0].weight
    wrong = [
        lambda: layer_data_mesh(3, 1),
        lambda: layer_data_mesh(0, 2),
        lambda: DistributedNetwork(net, init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "layer")), x),
        lambda: DistributedNetwork(lgd.DecoupledNetwork([torch.nn.Linear(5, 3)]), mesh, x),
        lambda: DistributedNetwork(shared, mesh, x),
        lambda: part.visit_(x, [*z, x], labels, step_size=0.1),
        lambda: part.visit_(x, [value.double() for value in z], labels, step_size=0.1),
        lambda: part.visit_(x, [value.t().contiguous().t() for value in z], labels, step_size=0.1),
        lambda: part.visit_(x, z, labels, step_size=-0.1),
        lambda: ShardedCheckpoints("nowhere", keep=0),
    ]
    messages = []
    for call in wrong:
        try:
            call()
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    return messages


def _train(
    net,
    x,
    labels,
    batches,
    values,
    shard,
    first,
    state_dict,
    *,
    visits=VISITS,
    checkpoints=None,
    on_visit=None,
    lr=1e-2,
) -> Run:
    store = lgd.ActivationStore(len(x), [value.shape[1:] for value in values], dtype=x.dtype)
    everything = store.gather(torch.arange(len(x)))
    for z, value in zip(everything.z, values, strict=True):
        z.copy_(value)
    store.scatter(everything)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, eps=1e-3)
    begin = 0 if checkpoints is None else checkpoints.load(net, optimizer, store) or 0
    made = []
    for batch in batches[begin : begin + visits]:
        if on_visit is not None:
            on_visit()
        stored = store.gather(batch)
        numbers = {"multiplier": stored.multiplier, "optimizer": optimizer, **NUMBERS}
        made.append(net.visit_(x[batch], stored.z, labels[batch], **numbers))
        store.scatter(stored)
    if checkpoints is not None:
        checkpoints.save(begin + len(made), net, optimizer, store)
    curves = [torch.stack(curve) for curve in zip(*made, strict=True)]
    kept = [{first + 1 + i: value.clone() for i, value in enumerate(of)} for of in (store.z, store.multiplier)]
    return Run(*curves, state_dict(), *kept, shard)
