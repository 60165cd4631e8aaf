"""Minibatches in an order that a seed and the epoch's number fix, so that a run can be resumed in the middle of one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from lgd_kernels.arguments import check_int

_DEFAULT_BATCH_SIZE = 64
# what a DataLoader was made with, besides its data set and their order
_KEPT = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
_KEPT += ("prefetch_factor", "persistent_workers")

Data = DataLoader | Dataset | tuple[Tensor, Tensor]


class Batches:
    """The samples of `data` with their indices, minibatch by minibatch.

    A sample's index is its place in the data set. An epoch's order depends on (seed, epoch) alone, and not on any
    generator's state, so that to go on in the middle of an epoch nothing needs to be loaded twice.

    Args:
        data: (x, target), tensors with a row for each of n samples; or a map-style Dataset of pairs (x, target); or a
            DataLoader of one, whose batch size, `shuffle`, `drop_last`, workers and `collate_fn` are kept.
        batch_size: None: that of the DataLoader, else 64.
        shuffle: None: that of the DataLoader, else yes.

    Raises:
        TypeError, ValueError: data of another kind; a DataLoader with a sampler of its own, whose order nobody could
            repeat; a batch_size together with a DataLoader.
    """

    def __init__(self, data: Data, batch_size: int | None, *, seed: int, shuffle: bool | None = None):
        self._tensors = self._queue = self._loader = None
        self._drop_last = False
        if isinstance(data, DataLoader):
            if batch_size is not None:
                raise ValueError(f"batch_size: the DataLoader has its own ({data.batch_size}), got {batch_size}")
            batch_size, self._drop_last = data.batch_size, data.drop_last
            shuffle = _is_shuffled(data) if shuffle is None else shuffle
            self._take_dataset(data.dataset, {name: getattr(data, name) for name in _KEPT})
        elif isinstance(data, (tuple, list)):
            self._take_tensors(data)
        else:
            self._take_dataset(data, {})
        self.batch_size = _DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        check_int("batch_size", self.batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")
        self.seed, self._shuffle = seed, True if shuffle is None else shuffle

    def __len__(self) -> int:
        """The number of minibatches of an epoch."""
        whole, rest = divmod(self.n_samples, self.batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def of_epoch(self, epoch: int) -> list[Tensor]:
        """The indices of every minibatch, (batch_size,) int64 each; the last one may have fewer."""
        if self._shuffle:
            # a seed of its own for every pair: torch's generator looks at 32 bits only, and seed + epoch would give the
            # second epoch of one seed the order of the first epoch of the next
            generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(32))
            order = torch.randperm(self.n_samples, generator=generator, device="cpu")
        else:
            order = torch.arange(self.n_samples, device="cpu")
        return list(order.split(self.batch_size))[: len(self)]

    def load(self, batches: list[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) of each of these minibatches, on the device."""
        for x, target in self._loaded(batches):
            yield x.to(device, non_blocking=True), target.to(device, non_blocking=True)

    def _loaded(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._tensors is not None:
            x, target = self._tensors
            yield from ((x[indices.to(x.device)], target[indices.to(target.device)]) for indices in batches)
            return
        self._queue[:] = [indices.tolist() for indices in batches]
        for indices, pair in zip(batches, self._loader, strict=True):
            yield _checked(pair, len(indices))

    def _take_tensors(self, data: tuple[Tensor, Tensor]) -> None:
        if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() > 0 for part in data):
            raise TypeError(f"data: expected two tensors (x, target), got {_kinds(data)}")
        x, target = data
        if len(x) != len(target):
            raise ValueError(f"data: x has {len(x)} rows, but target has {len(target)}")
        self._tensors, self.n_samples = (x, target), len(x)

    def _take_dataset(self, dataset: Dataset, options: dict[str, Any]) -> None:
        if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and isinstance(dataset, Sized)):
            raise TypeError(
                "data: expected a DataLoader, a Dataset with a length, or (x, target), because every sample has hidden "
                f"values of its own that its index finds; got {type(dataset).__name__}"
            )
        self.n_samples, self._queue = len(dataset), []
        # the seed of the workers must not come from torch's default generator, whose state a checkpoint has
        self._loader = DataLoader(dataset, batch_sampler=self._queue, generator=torch.Generator("cpu"), **options)


def _is_shuffled(loader: DataLoader) -> bool:
    sampler = loader.sampler
    if (
        loader.batch_size is None
        or type(sampler) not in (RandomSampler, SequentialSampler)
        or (isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != len(loader.dataset)))
    ):
        raise ValueError(
            "data: expected a DataLoader made with batch_size and shuffle, whose order can be repeated, got one with "
            f"batch_size={loader.batch_size} and {type(sampler).__name__}"
        )
    return isinstance(sampler, RandomSampler)


def _checked(pair: Any, n: int) -> tuple[Tensor, Tensor]:
    """What a DataLoader gave, if it is (x, target) of n samples."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)):
        raise TypeError(f"data: expected minibatches (x, target) of two tensors, got {_kinds(pair)}")
    if not all(len(part) == n for part in pair):
        raise ValueError(f"data: x has {len(pair[0])} rows and target {len(pair[1])} in a minibatch of {n}")
    return pair[0], pair[1]


def _kinds(value: Any) -> str:
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    return f"({', '.join(type(part).__name__ for part in value)})"
