"""Checkpoints of a run of many processes, which any other mesh of processes can read."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from lgd_kernels.decoupled.checkpoint import check_counts
from lgd_kernels.decoupled.distributed import DistributedNetwork
from lgd_kernels.decoupled.store import ActivationStore

_NAME = re.compile(r"step-(\d+)")
_METADATA = ".metadata"  # the file that torch.distributed.checkpoint writes when all others are complete
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # keyed by names of parameters, which no mesh changes


class ShardedCheckpoints:
    """The last checkpoints of one run, by torch.distributed.checkpoint, in a folder that all ranks see.

        checkpoints = ShardedCheckpoints("runs/deep")
        step = checkpoints.load(part, optimizer, store) or 0
        ...
        checkpoints.save(step, part, optimizer, store)

    A checkpoint has parameters and buffers by their names in the net, the optimizer's state by those names too, and
    z_t and its multipliers by t, as tensors of all samples: each rank writes and reads what it has. So a run goes on
    with other numbers of blocks and shards than it had. All methods are called by all ranks at the same time.

    Random states are not saved. The metadata of torch.distributed.checkpoint is a pickle: load what you trust.

    Args:
        folder: is made if it is not there.
        every, keep: as in `Checkpoints`; every is for `fit`.
    """

    def __init__(self, folder: str | os.PathLike, *, every: int | None = None, keep: int = 2):
        check_counts(every=every, keep=keep)
        self.folder, self.every, self.keep = Path(folder), every, keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints that are there, oldest first."""
        return [step for step, _ in self._complete()]

    def save(
        self,
        step: int,
        part: DistributedNetwork,
        optimizer: Optimizer,
        store: ActivationStore | None,
        rest: dict[str, Any] | None = None,
    ) -> None:
        """Write the state after this step, then remove all but the `keep` last. A rank that dies meanwhile leaves an
        unfinished one, which `load` passes over.

        optimizer: has made a step, or torch.distributed.checkpoint makes it, with gradients of 0.
        store: None where no hidden values are kept.
        rest: what else is the same on all ranks, such as {"scheduler": scheduler.state_dict()}.

        Raises ValueError for a store of other samples than the shard's, RuntimeError if a rank could not write.
        """
        path = self.folder / f"step-{step:09d}"
        with _naming(f"saving {path}"):
            dcp.save(_state(part, optimizer, store, rest), checkpoint_id=path)
        if dist.get_rank() == 0:
            complete = self._complete()
            for _, old in complete[: max(0, len(complete) - self.keep)]:
                shutil.rmtree(old)

    def load(
        self,
        part: DistributedNetwork,
        optimizer: Optimizer,
        store: ActivationStore | None,
        rest: dict[str, Any] | None = None,
    ) -> int | None:
        """Take over the state of the last complete checkpoint, in place; returns its step, None if there is none.

        rest: gets what was saved as rest, if it is not None.

        Raises ValueError for a store of other samples than the shard's, RuntimeError for a checkpoint of another net or
        data set.
        """
        complete = self._complete()
        last = torch.tensor(complete[-1][0] if complete else -1)
        dist.broadcast(last, 0)  # what rank 0 sees counts
        step = int(last)
        if step < 0:
            return None
        path, state = self.folder / f"step-{step:09d}", _state(part, optimizer, store, rest)
        with _naming(f"loading {path}"):
            dcp.load(state, checkpoint_id=path)
        set_optimizer_state_dict(part, optimizer, state["optimizer"], options=_FLAT)
        if rest is not None:
            rest.update(*state["rest"])
        return step

    def _complete(self) -> list[tuple[int, Path]]:
        names = ((_NAME.fullmatch(path.parent.name), path.parent) for path in self.folder.glob(f"*/{_METADATA}"))
        return sorted((int(match[1]), path) for match, path in names if match)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:  # no Exception, so that it passes `except Exception`
        raise RuntimeError(f"rank {dist.get_rank()}: {what} failed ({error})") from error


def _state(
    part: DistributedNetwork, optimizer: Optimizer, store: ActivationStore | None, rest: dict[str, Any] | None
) -> dict[str, Any]:
    """What there is to save, or to load into: the tensors are not copied."""
    state = {} if store is None else _state_of_store(part, store)
    if rest is not None:
        state["rest"] = (rest,)  # a tuple is written as it is, while of a dict each entry must be there to be loaded
    optimizer_state = get_optimizer_state_dict(part, optimizer, options=_FLAT)
    return {"net": part.state_dict(), "optimizer": optimizer_state, **state}


def _state_of_store(part: DistributedNetwork, store: ActivationStore) -> dict[str, Any]:
    n_samples = part.n_samples(len(store))
    shard = part.shard(n_samples)
    if len(store) != len(shard):
        raise ValueError(f"store: has {len(store)} samples, but this rank's shard of {n_samples} has {len(shard)}")

    def of_all_samples(layers: list[Tensor] | None) -> dict[str, DTensor]:
        numbers = itertools.count(part.block.start + 1)
        return {f"{t}": _sharded(layer, n_samples, part) for t, layer in zip(numbers, layers or [], strict=False)}

    return {"z": of_all_samples(store.z), "multiplier": of_all_samples(store.multiplier)}


def _sharded(rows: Tensor, n_samples: int, part: DistributedNetwork) -> DTensor:
    """This shard's rows as the ones that they are of a tensor of all samples."""
    shape = torch.Size((n_samples, *rows.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements, mesh = [Shard(0)], part.mesh["data"]
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)
