"""Whether tensors share memory: what is written in place must not be anything else's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements may lie in one place of memory."""
    if tensor.is_contiguous():
        return False
    reach = 1  # elements that the smaller strides lead to
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return tensor.numel() > 0
        reach += (size - 1) * stride
    return False


def check_memory(read: dict[str, list[Tensor]], written: dict[str, list[Tensor]]) -> None:
    """Nothing that is written shares memory with anything else."""
    by_storage: dict[int, list[tuple[str, Tensor, bool]]] = {}
    for tensors, is_written in ((read, False), (written, True)):
        for name, of_name in tensors.items():
            for tensor in of_name:
                if tensor.numel():
                    neighbours = by_storage.setdefault(tensor.untyped_storage().data_ptr(), [])
                    neighbours.append((name, tensor, is_written))
    for neighbours in by_storage.values():
        if len(neighbours) > 1:
            places = [(*_extent(tensor), name, tensor, is_written) for name, tensor, is_written in neighbours]
            _check_neighbours(sorted(places, key=lambda place: place[0]))


def _check_neighbours(places: list[tuple[int, int, str, Tensor, bool]]) -> None:
    """The same for tensors of one storage, in the order of their beginnings."""
    open_places: list[tuple[int, int, str, Tensor, bool]] = []
    for place in places:
        begin, _, name, tensor, is_written = place
        open_places = [other for other in open_places if other[1] > begin]
        for _, _, other_name, other, other_is_written in open_places:
            if (is_written or other_is_written) and _overlap(other, tensor):
                raise ValueError(f"{name}: shares memory with {other_name}, and decoupled_step_ writes in place")
        open_places.append(place)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage whose extents meet have a byte in common; yes if their dtypes differ."""
    if a.element_size() != b.element_size():
        return True
    period = math.gcd(*a.stride()[:-1], *b.stride()[:-1])
    if period > 0 and a.stride(-1) == b.stride(-1) == 1:  # rows side by side, as where each sample has all its layers
        shift = (b.storage_offset() - a.storage_offset()) % period
        if a.shape[-1] <= shift and shift + b.shape[-1] <= period:
            return False
    first = min(a.storage_offset(), b.storage_offset())
    places = torch.arange(max(_extent(a)[1], _extent(b)[1]) // a.element_size() - first)
    of_a, of_b = (places.as_strided(t.shape, t.stride(), t.storage_offset() - first).reshape(-1) for t in (a, b))
    return bool(torch.isin(of_a, of_b).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from its first to the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset()
    return begin * tensor.element_size(), (begin + last + 1) * tensor.element_size()
