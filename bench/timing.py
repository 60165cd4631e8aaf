"""The timing loop.

Peers take turns, in short bursts: noise that lasts (another process, a clock that drops) hits all of them alike, and
the first call of a burst, which finds the caches and the heap as another peer left them, is not counted. The peer that
starts changes from round to round. Bursts are short because long ones flatter: 50 copies of 33 MB in a row run partly
from the L3 cache, at 0.7 or 1.3 ms as it happens.

What is timed on a GPU is the GPU: between two events, with its cache full of something else, and with the host ahead of
it, as in training, where the next kernel is in the queue before the last one ends.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Calls = dict[str, Callable[[], object]]
Clock = Callable[[Callable[[], object]], float]  # seconds of one call

CALLS_PER_BURST = 5
LEAST_ROUNDS = 3
FULL_SECONDS = {"cpu": 15.0, "cuda": 2.0}  # per workload
QUICK_SECONDS = 0.3
HEAD_START = 2_000_000  # cycles, about 1 ms: longer than it takes to launch forward and backward


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


@functools.cache
def _filler() -> Tensor:
    """Four times what the cache of the GPU holds."""
    size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.zeros(size // 4, device="cuda")


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """Seconds that the GPU spends on one call."""
    _filler().sum()  # read and not written: what is written would go to memory in the middle of the call
    torch.cuda._sleep(HEAD_START)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def launches_of(call: Callable[[], object]) -> int:
    """Kernels and copies that the GPU runs in one call, those of a graph counted one by one."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiled.events())


CLOCKS: dict[str, Clock] = {"cpu": seconds_of, "cuda": seconds_on_gpu}  # by device


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


def _burst(call: Callable[[], object], before_each_call: Callable[[], None], clock: Clock) -> list[float]:
    """Seconds of the calls of one burst, without the first."""
    seconds = []
    for _ in range(CALLS_PER_BURST):
        before_each_call()
        seconds.append(clock(call))
    return seconds[1:]


def time_interleaved(
    calls: Calls,
    before_each_call: Callable[[], None],
    seconds_in_all: float,
    after_each_round: Callable[[float], None],
    clock: Clock = seconds_of,
) -> dict[str, Timing]:
    """Time the calls against each other for about seconds_in_all, or LEAST_ROUNDS rounds if they take longer.

    A first round, not counted, warms up. after_each_round: takes the share of the rounds that one round is.
    """
    peers = list(calls)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    with _no_garbage_collection():
        one_round = seconds_of(lambda: [_burst(calls[peer], before_each_call, clock) for peer in peers])
        rounds = max(LEAST_ROUNDS, round(seconds_in_all / one_round))
        for first in range(rounds):
            for turn in range(len(peers)):
                peer = peers[(first + turn) % len(peers)]
                seconds[peer] += _burst(calls[peer], before_each_call, clock)
            after_each_round(1 / rounds)
    return {peer: summarize(seconds[peer]) for peer in peers}
