"""What is timed. One file per operation, with a function `prepare(workload)` that returns a `Problem`.

Peers go by the same names everywhere:

    copy       a copy of the largest input into memory that is there already: the unit for memory-bound work
    eager      what a user of PyTorch writes
    compiled   the same under torch.compile
    ours       lgd_kernels
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from bench.workloads import Workload

TITLES = {"copy": "copy of the logits", "eager": "PyTorch eager", "compiled": "torch.compile", "ours": "lgd_kernels"}

Outputs = dict[str, Tensor | None]


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

    calls: by peer; one call is what is timed, and returns its outputs by name. before_each_call: what each call needs
    done first, outside the time. expected: computes the right outputs by name. copied_bytes: moved by one call of the
    peer "copy". least_bytes, flops: what no implementation can do without.
    """

    calls: dict[str, Callable[[], Outputs]]
    before_each_call: Callable[[], None]
    expected: Callable[[], dict[str, Expected]]
    copied_bytes: int
    least_bytes: int
    flops: int


def prepare(workload: Workload) -> Problem:
    """The data, the peers and the right outputs of a workload."""
    return importlib.import_module(f"bench.peers.{workload.operation}").prepare(workload)
