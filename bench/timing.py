"""The timing loop.

Peers take turns, in short bursts: noise that lasts (another process, a clock that drops) hits all of them alike, and
the first call of a burst, which finds the caches and the heap as another peer left them, is not counted. The peer that
starts changes from round to round. Bursts are short because long ones flatter: 50 copies of 33 MB in a row run partly
from the L3 cache, at 0.7 or 1.3 ms as it happens.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Calls = dict[str, Callable[[], object]]

CALLS_PER_BURST = 5
LEAST_ROUNDS = 3
FULL_SECONDS, QUICK_SECONDS = 15.0, 0.3  # per workload


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


def _burst(call: Callable[[], object], before_each_call: Callable[[], None]) -> list[float]:
    """Seconds of the calls of one burst, without the first."""
    seconds = []
    for _ in range(CALLS_PER_BURST):
        before_each_call()
        seconds.append(seconds_of(call))
    return seconds[1:]


def time_interleaved(
    calls: Calls,
    before_each_call: Callable[[], None],
    seconds_in_all: float,
    after_each_round: Callable[[float], None],
) -> dict[str, Timing]:
    """Time the calls against each other for about seconds_in_all, or LEAST_ROUNDS rounds if they take longer.

    A first round, not counted, warms up. after_each_round: takes the share of the rounds that one round is.
    """
    peers = list(calls)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    with _no_garbage_collection():
        one_round = seconds_of(lambda: [_burst(calls[peer], before_each_call) for peer in peers])
        rounds = max(LEAST_ROUNDS, round(seconds_in_all / one_round))
        for first in range(rounds):
            for turn in range(len(peers)):
                peer = peers[(first + turn) % len(peers)]
                seconds[peer] += _burst(calls[peer], before_each_call)
            after_each_round(1 / rounds)
    return {peer: summarize(seconds[peer]) for peer in peers}
