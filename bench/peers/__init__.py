"""What is timed. One file per operation, with a function `prepare(workload)` that returns a `Problem`.

Peers go by the same names everywhere; see operations.py for what they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bench.workloads import Workload

Outputs = dict[str, Tensor | Callable[[], Tensor] | None]  # a function: how to put it together, outside the time


@dataclass(frozen=True)
class Expected:
    """An output in float64.

    value: the right result. scale: the magnitude of the terms that each element of it is a sum of, which rounding
    errors are relative to. tolerance: the largest such relative error that rounding explains.
    """

    value: Tensor
    scale: Tensor
    tolerance: float


@dataclass(frozen=True)
class Problem:
    """One workload with its data.

    calls: by peer, of those that this machine has; one call is what is timed, and returns its outputs by name.
    before_each_call: what each call needs done first, outside the time. expected: computes the right outputs by name,
    of the last of checked_calls calls. copied_bytes: moved by one call of the peer "copy". least_bytes, flops: what no
    implementation can do without. device: "cpu" or "cuda".
    """

    calls: dict[str, Callable[[], Outputs]]
    before_each_call: Callable[[], None]
    expected: Callable[[], dict[str, Expected]]
    copied_bytes: int
    least_bytes: int
    flops: int
    checked_calls: int = 1
    device: str = "cpu"


def compiled(function: Callable, device: str = "cpu") -> Callable:
    """torch.compile, tuned, and without its reports on that. Without CUDA graphs: a CPU has none, and on a GPU they
    would copy the logits in every call. On a GPU without coordinate descent, which takes minutes for each kernel."""
    from torch._inductor import config, select_algorithm

    config.max_autotune_report_choices_stats = select_algorithm.PRINT_AUTOTUNE = False
    if device == "cpu":
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    return torch.compile(function, options={"max_autotune": True}, dynamic=False)


def prepare(workload: Workload) -> Problem:
    """The data, the peers and the right outputs of a workload."""
    return importlib.import_module(f"bench.peers.{workload.operation.name}").prepare(workload)
