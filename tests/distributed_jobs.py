"""A small training run, by one process or by the ranks of a mesh: see test_distributed.py."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from small_networks import NETS
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import TensorDataset

import lgd_kernels as lgd
from lgd_kernels.decoupled import (
    Backpropagation,
    Callback,
    Checkpoints,
    EpochNumbers,
    Mode,
    StoredValues,
    Training,
    distributed,
    residual_net,
)
from lgd_kernels.decoupled.distributed import DistributedNetwork
from lgd_kernels.decoupled.energy import LinearLayers
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


class Fitted(NamedTuple):
    """What came of `fit`."""

    history: dict[str, list]  # without the seconds
    net: dict[str, Tensor]
    shows_bar: bool
    n_logged: int  # numbers that were written to the log


@functools.cache
def fit_alone(dtype: torch.dtype, mode: Mode) -> Fitted:
    net, x, labels, _ = setting("mixed", dtype)
    return _fit(net, x, labels, mode, net.state_dict)


def fit_together(n_layer: int, n_data: int, dtype: torch.dtype, mode: Mode, **options) -> Fitted:
    net, x, labels, _ = setting("mixed", dtype)
    part = DistributedNetwork(net, layer_data_mesh(n_layer, n_data), x[:2])
    return _fit(part, x, labels, mode, part.full_state_dict, **options)


class InterruptionError(Exception):
    """Ends a run on all ranks, after a step."""


class Interrupt(Callback):
    def __init__(self, step: int):
        self._step = step

    def on_batch_end(self, training: Training) -> None:
        if training.step == self._step:
            raise InterruptionError


def fit_until(step: int, folder: Path, n_layer: int, n_data: int, *args) -> None:
    """Save a checkpoint after every fifth step."""
    options = {"checkpoint": ShardedCheckpoints(folder, every=5), "callbacks": [Interrupt(step)]}
    with contextlib.suppress(InterruptionError):
        fit_together(n_layer, n_data, *args, **options)


def fit_on(folder: Path, n_layer: int, n_data: int, *args) -> Fitted:
    """Go on from the last checkpoint, if there is one; save one after every epoch."""
    return fit_together(n_layer, n_data, *args, checkpoint=folder, resume=True)


def _fit(net, x: Tensor, labels: Tensor, mode: Mode, state_dict, **options) -> Fitted:
    """Minibatches are so small that some have nothing of a shard."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2, eps=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    numbers = {"epochs": 2, "optimizer": optimizer, "scheduler": scheduler, "mode": mode, "batch_size": 3}
    log, bar = mock.Mock(spec=["add_scalar"]), io.StringIO()
    with contextlib.redirect_stderr(bar):
        data, validation = TensorDataset(x, labels), (x[:9], labels[:9])
        history = lgd.fit(net, data, validation=validation, log=log, **numbers, **options).state_dict()
    del history["seconds"]
    return Fitted(history, state_dict(), "training" in bar.getvalue(), log.add_scalar.call_count)


class Sent(NamedTuple):
    """Numbers (not bytes) that a rank handed over in a visit."""

    to_neighbours: int
    to_sums: list[int]  # one by one
    order: list[str]  # in which "gradients" were computed, a "sum" was begun, and a "wait" for one


class Watched(NamedTuple):
    """A dist.Work that tells when it is waited for."""

    work: dist.Work
    order: list[str]

    def wait(self) -> None:
        self.order.append("wait")
        self.work.wait()


def count_what_is_sent(
    n_layer: int, n_data: int, width: int, layers: int, samples: int, steps: int, bucket_bytes: int
) -> Sent:
    """In a visit of a residual net with `layers` layers in each block."""
    sent = Sent(0, [], [])
    to_neighbours, isend, all_reduce, gradients_of = [], dist.isend, dist.all_reduce, LinearLayers._gradients_of

    def watched_sum(tensor: Tensor, **options: Any) -> Watched:
        sent.order.append("sum")
        sent.to_sums.append(tensor.numel())
        return Watched(all_reduce(tensor, **options), sent.order)

    def watched_gradients(*args: Any) -> list:
        sent.order.append("gradients")
        return gradients_of(*args)

    net = lgd.DecoupledNetwork(residual_net(width, width, layers * n_layer - 1, 3))
    x, labels = torch.randn(samples, width), torch.randint(3, (samples,))
    part = DistributedNetwork(net, layer_data_mesh(n_layer, n_data), x)
    z = part.hidden_values(x)
    distributed.BUCKET_BYTES, LinearLayers._gradients_of = bucket_bytes, watched_gradients
    dist.isend = lambda tensor, **options: (to_neighbours.append(tensor.numel()), isend(tensor, **options))[1]
    dist.all_reduce = watched_sum
    part.visit_(x, z, labels, step_size=0.1, steps=steps)
    return sent._replace(to_neighbours=sum(to_neighbours))


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
        lambda: fit(mode=Backpropagation()),
        lambda: fit(clip_grad_norm=1.0),
        lambda: fit(autocast=True),
        lambda: fit(checkpoint=Checkpoints("nowhere")),
        lambda: fit(store=lgd.ActivationStore(N - 1, part.shapes)),
    ]

    def fit(**options: Any) -> None:
        lgd.fit(part, (x, labels), epochs=1, optimizer=torch.optim.Adam(part.parameters()), **options)

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
