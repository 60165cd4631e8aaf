"""Calls of decoupled_linear and its backward whose stacks are answered by different backends.

Lists have one entry for each stack, but lists of numbers and tensors outside of lists have one for each layer, as
lgd_kernels/reference/decoupled_linear.py says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lgd_kernels.reference.decoupled_linear import n_layers_of, stack_by_stack


def call_by_key(keys: Sequence[Hashable], call: Callable, args: Sequence) -> tuple:
    """call(key, *args) for the stacks of every key, put together in the order of the stacks.

    keys: one for each stack. args: those of the op, the first of them z."""
    if len(set(keys)) == 1:
        return call(keys[0], *args)
    counts = [n_layers_of(z.shape) for z in args[0]]
    made: dict[int, list] = {}  # what there is of every stack
    for key in set(keys):
        chosen = [i for i, other in enumerate(keys) if other == key]
        outputs = call(key, *(_join(argument, [_parts(argument, counts)[i] for i in chosen]) for argument in args))
        parts = (_parts(output, [counts[i] for i in chosen]) for output in outputs)
        made |= zip(chosen, zip(*parts, strict=True), strict=True)
    in_order = zip(*(made[i] for i in range(len(keys))), strict=True)
    return tuple(_join(output, parts) for output, parts in zip(outputs, in_order, strict=True))


def _parts(argument, counts: Sequence[int]) -> Sequence:
    """What an argument says of every stack, of which there are so many layers."""
    if isinstance(argument, Tensor):
        return argument.split(list(counts))
    if _is_of_layers(argument):
        return [part for (part,) in stack_by_stack(counts, argument)]
    return argument if isinstance(argument, (list, tuple)) else [argument] * len(counts)


def _join(argument, parts: Sequence):
    """The parts of some stacks as an argument like this one."""
    if isinstance(argument, Tensor):
        return torch.cat(list(parts))
    if _is_of_layers(argument):
        return [number for part in parts for number in part]
    return list(parts) if isinstance(argument, (list, tuple)) else argument


def _is_of_layers(argument) -> bool:
    """Whether it is a list of numbers."""
    return isinstance(argument, (list, tuple)) and type(argument[0]) in (int, float)
