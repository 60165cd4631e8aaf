"""Minibatches in an order that a seed and the epoch's number fix, so that a run can be resumed in the middle of one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from lgd_kernels.arguments import check_at_least

_DEFAULT_BATCH_SIZE = 64

# what a DataLoader was made with, besides its samples and their order
_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)

Data = DataLoader | Dataset | tuple[Tensor, Tensor]
Pairs = Iterator[tuple[Tensor, Tensor]]


class Batches:
    """The samples of a data set, by minibatches of their indices. A sample's index is its place in the data set.

    An epoch's order depends on (seed, epoch) alone, and not on any generator's state, so that to go on in the middle of
    an epoch nothing needs to be loaded twice.

    Args:
        data: (x, target), tensors with a row for each of n samples; or a map-style Dataset of pairs (x, target); or a
            DataLoader of one, whose batch size, `shuffle`, `drop_last`, workers and `collate_fn` are kept.
        batch_size: None: that of the DataLoader, else 64.
        seed: of the order; a DataLoader without `shuffle` keeps the order of its data set.
        name: what messages call the data.

    Attributes:
        n_samples, batch_size, seed: of all processes together.
        shard: range of the samples that this process loads, which is all of them unless it is set.

    Raises:
        TypeError, ValueError: data of another kind, or without samples; a DataLoader with a sampler of its own, whose
            order nobody could repeat; a batch_size together with a DataLoader.
    """

    def __init__(self, data: Data, batch_size: int | None, *, seed: int, name: str = "data"):
        self.seed, self._is_shuffled, self._drop_last = seed, True, False
        if isinstance(data, DataLoader):
            if batch_size is not None:
                raise ValueError(f"batch_size: the DataLoader has its own ({data.batch_size}), got {batch_size}")
            _check_sampler(data, name)
            self._is_shuffled, self._drop_last = isinstance(data.sampler, RandomSampler), data.drop_last
            batch_size = data.batch_size
            self._source = _Samples(data.dataset, {option: getattr(data, option) for option in _OPTIONS}, name)
        else:
            self._source = _Rows(data, name) if isinstance(data, (tuple, list)) else _Samples(data, {}, name)
        self.n_samples = self._source.n_samples
        self.shard = range(self.n_samples)
        self.batch_size = _DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        check_at_least("batch_size", self.batch_size, 1)
        if len(self) == 0:
            raise ValueError(f"{name}: its {self.n_samples} samples make no minibatch of {self.batch_size}")

    def __len__(self) -> int:
        """The number of minibatches of an epoch."""
        whole, rest = divmod(self.n_samples, self.batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def of_epoch(self, epoch: int) -> list[Tensor]:
        """The indices of every minibatch of an epoch, (batch_size,) int64; in the last one there may be fewer."""
        order = torch.arange(self.n_samples, device="cpu")
        if self._is_shuffled:
            # a seed for every pair: torch's generator looks at 32 bits of it, and with seed + epoch the second epoch of
            # one seed would have the order of the first epoch of the next
            generator = torch.Generator("cpu").manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(32))
            order = torch.randperm(self.n_samples, generator=generator, device="cpu")
        return list(order.split(self.batch_size))[: len(self)]

    def in_order(self) -> list[Tensor]:
        """The indices of all samples in the order of the data set, in minibatches of nearly one size: BatchNorm refuses
        one of a single sample, which `drop_last` would not have left over."""
        return list(torch.arange(self.n_samples, device="cpu").tensor_split(-(-self.n_samples // self.batch_size)))

    def of_shard(self, indices: Tensor) -> Tensor:
        """Those of the samples that are in the shard."""
        if len(self.shard) == self.n_samples:
            return indices
        return indices[(indices >= self.shard.start) & (indices < self.shard.stop)]

    def load(self, batches: list[Tensor], device: torch.device) -> Pairs:
        """(x, target) of what the shard has of each of these minibatches, on the device; it may be 0 samples."""
        ours = [self.of_shard(indices) for indices in batches]
        some = torch.zeros(1, dtype=torch.int64, device="cpu")  # no collate_fn makes a minibatch of no samples
        loaded = self._source.load([indices if len(indices) else some for indices in ours])
        for indices, pair in zip(ours, loaded, strict=True):
            x, target = (part[: len(indices)].to(device, non_blocking=True) for part in pair)
            yield x, target


class _Rows:
    """Samples that are rows of two tensors."""

    def __init__(self, data: Any, name: str):
        if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() > 0 for part in data):
            raise TypeError(f"{name}: expected two tensors (x, target), got {_described(data)}")
        self._x, self._target = data
        self.n_samples = len(self._x)
        if len(self._target) != self.n_samples:
            raise ValueError(f"{name}: x has {self.n_samples} rows, but target has {len(self._target)}")

    def load(self, batches: list[Tensor]) -> Pairs:
        for indices in batches:
            yield self._x[indices.to(self._x.device)], self._target[indices.to(self._target.device)]


class _Samples:
    """Samples of a Dataset, which a DataLoader puts together."""

    def __init__(self, dataset: Any, options: dict[str, Any], name: str):
        has_indices = hasattr(dataset, "__getitem__") and isinstance(dataset, Sized)
        if not has_indices or isinstance(dataset, (IterableDataset, Tensor)):
            raise TypeError(
                f"{name}: expected (x, target), a Dataset with indices and a length, or a DataLoader of one, because "
                f"every sample has hidden values of its own; got {type(dataset).__name__}"
            )
        self._name, self.n_samples = name, len(dataset)
        self._wanted: list[list[int]] = []
        # for the seeds of worker processes, which must not come from torch's default generator: a checkpoint has its
        # state. On the default device, because there the DataLoader draws
        generator = torch.Generator(torch.get_default_device())
        self._loader = DataLoader(dataset, batch_sampler=self._wanted, generator=generator, **options)

    def load(self, batches: list[Tensor]) -> Pairs:
        self._wanted[:] = [indices.tolist() for indices in batches]
        for indices, pair in zip(batches, self._loader, strict=True):
            is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
            if not is_pair or not all(isinstance(part, Tensor) for part in pair):
                raise TypeError(f"{self._name}: expected minibatches (x, target) of tensors, got {_described(pair)}")
            if not all(part.shape[:1] == indices.shape for part in pair):
                shapes = " and ".join(str(tuple(part.shape)) for part in pair)
                raise ValueError(f"{self._name}: a minibatch of {len(indices)} samples has shapes {shapes}")
            yield pair[0], pair[1]


def _check_sampler(loader: DataLoader, name: str) -> None:
    sampler = loader.sampler
    is_shuffle = type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(loader.dataset)
    if loader.batch_size is None or not (is_shuffle or type(sampler) is SequentialSampler):
        raise ValueError(
            f"{name}: expected a DataLoader made with batch_size and shuffle, whose order can be repeated; got one "
            f"with batch_size={loader.batch_size} and a {type(sampler).__name__}"
        )


def _described(value: Any) -> str:
    if not isinstance(value, (tuple, list)):
        return type(value).__name__
    return f"({', '.join(type(part).__name__ for part in value)})"
