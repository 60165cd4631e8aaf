"""Before anything is timed: every peer against float64. A peer whose result is wrong gets no time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import Expected, Problem

OK = "ok"


@dataclass(frozen=True)
class Check:
    """status: `OK`, or why the peer is not timed. error: the largest one of its outputs; None if it has none."""

    status: str
    error: float | None

    @property
    def passed(self) -> bool:
        return self.status == OK


def relative_error(got: Tensor | None, expected: Expected) -> float:
    """The largest error of an output relative to the scale of its element; infinite for a missing or misshapen one."""
    if got is None or got.shape != expected.value.shape:
        return float("inf")
    difference = (got.double() - expected.value).abs()
    return float(torch.where(difference == 0, 0, difference / expected.scale).max())


def _check_call(call, expected: dict[str, Expected], n_calls: int) -> Check:
    try:
        outputs = [call() for _ in range(n_calls)][-1]
    except Exception as error:  # a peer may need what this machine lacks: torch.compile a C++ compiler
        return Check(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}", None)
    made = {name: output() if callable(output) else output for name, output in outputs.items()}
    errors = {name: relative_error(output, expected[name]) for name, output in made.items()}
    for name, error in errors.items():
        if not error <= expected[name].tolerance:  # NaN is wrong too
            return Check(f"wrong: {name} off by {error:.1e}, allowed {expected[name].tolerance:.1e}", error)
    return Check(OK, max(errors.values()) if errors else None)


def check_peers(problem: Problem) -> dict[str, Check]:
    """A call of every peer, or as many as the problem says, and its outputs compared with the right ones."""
    expected = problem.expected()
    checks = {}
    for peer, call in problem.calls.items():
        problem.before_each_call()
        checks[peer] = _check_call(call, expected, problem.checked_calls)
    return checks
