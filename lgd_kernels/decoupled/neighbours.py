"""What the ranks of a (layer, data) mesh tell each other, with errors that say what could not be told, and to whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lgd_kernels.arguments import check_at_least

DIMENSIONS = ("layer", "data")


def layer_data_mesh(
    n_layer: int, n_data: int, *, device_type: str = "cpu", timeout: timedelta = timedelta(minutes=2)
) -> DeviceMesh:
    """The mesh of `DistributedNetwork`: n_layer blocks of layers times n_data shards of samples.

    Rank r has block r // n_data and shard r % n_data, so that the ranks that reduce gradients together are neighbours.
    The default process group is made from the environment, as torchrun sets it, unless there is one.

    timeout: after which an operation that a dead or hanging rank keeps waiting ends with an error; also for all ranks
        to join, where the default process group is made here.

    Raises ValueError if n_layer * n_data is not the number of ranks.
    """
    for name, number in (("n_layer", n_layer), ("n_data", n_data)):
        check_at_least(name, number, 1)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    if n_layer * n_data != dist.get_world_size():
        raise ValueError(
            f"n_layer, n_data: {n_layer} x {n_data} ranks are {n_layer * n_data}, but there are {dist.get_world_size()}"
        )
    ranks = torch.arange(n_layer * n_data, device="cpu").view(n_layer, n_data)
    # not init_device_mesh, whose groups have the default timeout of half an hour
    groups = [_own_group(lines.tolist(), timeout) for lines in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=DIMENSIONS)


def _own_group(lines: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group of those that the lines of ranks become, which all ranks must make together."""
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in lines]
    return next(group for group, ranks in zip(groups, lines, strict=True) if dist.get_rank() in ranks)


class Transfer(NamedTuple):
    """A tensor on its way to or from a neighbour."""

    work: dist.Work
    tensor: Tensor
    what: str

    def wait(self) -> Tensor:
        """The tensor, once it has arrived or left."""
        with naming(self.what):
            self.work.wait()
        return self.tensor


class Sum(NamedTuple):
    """Sums over some ranks, on their way."""

    tensors: Sequence[Tensor]  # of this rank
    together: Tensor | None  # one after the other; None where this rank is the only one
    work: dist.Work | None
    what: str

    def wait(self) -> list[Tensor]:
        """The sums, in the shapes and dtypes of the tensors."""
        if self.work is None:
            return list(self.tensors)
        with naming(self.what):
            self.work.wait()
        parts = self.together.split([tensor.numel() for tensor in self.tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, self.tensors, strict=True)]


class Neighbours:
    """The ranks with the blocks of layers below and above, for the same samples, and those with the same layers.

    Attributes: below, above: whether there is one.
    """

    def __init__(self, mesh: DeviceMesh):
        self._layer, self._data = (mesh.get_group(name) for name in DIMENSIONS)
        self._place, n_blocks = mesh.get_local_rank("layer"), mesh.size(0)
        self.below, self.above = self._place > 0, self._place + 1 < n_blocks
        self._sent: list[Transfer] = []

    def send(self, tensor: Tensor, name: str, direction: int) -> None:
        """Start to send a tensor up (1) or down (-1). Until `all_sent` it must stay as it is."""
        what, tensor = f"sending {name} to rank {self._rank(direction)}", tensor.contiguous()
        with naming(what):
            work = dist.isend(tensor, group=self._layer, group_dst=self._place + direction)
        self._sent.append(Transfer(work, tensor, what))

    def receive(self, into: Tensor, name: str, direction: int) -> Transfer:
        """Start to receive a contiguous tensor from above (1) or below (-1)."""
        what = f"receiving {name} from rank {self._rank(direction)}"
        with naming(what):
            work = dist.irecv(into, group=self._layer, group_src=self._place + direction)
        return Transfer(work, into, what)

    def all_sent(self) -> None:
        """Wait for what was sent: from here on it may be changed."""
        for transfer in self._sent:
            transfer.wait()
        self._sent.clear()

    def begin_sum_over_data(self, tensors: Sequence[Tensor], name: str) -> Sum:
        """Start to sum over the ranks with the same layers, all of which must start the same sums in the same order."""
        return _begin_sum(tensors, self._data, name)

    def sum_over_data(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """The sums over the ranks with the same layers."""
        return self.begin_sum_over_data(tensors, name).wait()

    def sum_over_layers(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """The sums over the ranks with the same samples."""
        return _begin_sum(tensors, self._layer, name).wait()

    def first_of_data_(self, tensors: Sequence[Tensor], name: str) -> None:
        """Take over the tensors of the first of the ranks with the same layers."""
        _broadcast_(tensors, self._data, 0, name)

    def of_block_(self, tensors: Sequence[Tensor], block: int, name: str) -> None:
        """Take over the tensors of the rank that has this block for the same samples."""
        _broadcast_(tensors, self._layer, block, name)

    def _rank(self, direction: int) -> int:
        return dist.get_global_rank(self._layer, self._place + direction)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """An error inside says which rank was doing what."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank()}: {what} failed; is that rank dead or slower than the timeout? ({error})"
        ) from error


def _begin_sum(tensors: Sequence[Tensor], group: dist.ProcessGroup, name: str) -> Sum:
    """In one call for all tensors, in the widest of their dtypes."""
    what = f"summing {name} over ranks {dist.get_process_group_ranks(group)}"
    if not tensors or dist.get_world_size(group) == 1:
        return Sum(tensors, None, None, what)
    together = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with naming(what):
        work = dist.all_reduce(together, group=group, async_op=True)
    return Sum(tensors, together, work, what)


def _broadcast_(tensors: Sequence[Tensor], group: dist.ProcessGroup, source: int, name: str) -> None:
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return
    with naming(f"taking over {name} of rank {ranks[source]} by ranks {ranks}"):
        for tensor in tensors:
            contiguous = tensor.contiguous()
            dist.broadcast(contiguous, group=group, group_src=source)
            if contiguous is not tensor:
                tensor.copy_(contiguous)
