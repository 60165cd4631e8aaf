"""The timing loop.

Peers take turns, in bursts: noise that lasts (another process, a clock that drops) hits all of them alike, and within a
burst the caches hold what the peer itself left there. The peer that starts changes from round to round, and the first
call of a burst is not counted.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds, and the length of each peer's burst in each round."""

    rounds: int
    burst_seconds: float


FULL = Effort(rounds=40, burst_seconds=0.05)
QUICK = Effort(rounds=5, burst_seconds=0.005)


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, over all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    calls: int


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summarize(seconds: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    if len(seconds) == 1:
        seconds = seconds * 2
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(1e3 * statistics.median(seconds), 1e3 * p20, 1e3 * p80, len(seconds))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _burst(call: Callable[[], object], before_each_call: Callable[[], None], n_calls: int) -> list[float]:
    """Seconds of n_calls calls, after one that is not counted."""
    seconds = []
    for _ in range(1 + n_calls):
        before_each_call()
        seconds.append(seconds_of(call))
    return seconds[1:]


def time_interleaved(
    calls: Calls, before_each_call: Callable[[], None], effort: Effort, after_each_round: Callable[[], None]
) -> dict[str, Timing]:
    """Time the calls against each other; a first round, not counted, warms up and sets the length of the bursts."""
    peers = list(calls)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    with _no_garbage_collection():
        per_call = {peer: min(_burst(calls[peer], before_each_call, 3)) for peer in peers}
        for first in range(effort.rounds):
            for turn in range(len(peers)):
                peer = peers[(first + turn) % len(peers)]
                n_calls = max(1, round(effort.burst_seconds / per_call[peer]))
                seconds[peer] += _burst(calls[peer], before_each_call, n_calls)
            after_each_round()
    return {peer: summarize(seconds[peer]) for peer in peers}
