"""One workload from its data to its rows of results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bench.correctness import Check, check_peers
from bench.floors import Rates, copy_rate, floor_ms
from bench.machine import Machine, backend_of, cpu_seconds_of_others
from bench.peers import Problem, prepare
from bench.results import Row
from bench.timing import CLOCKS, Timing, launches_of, time_interleaved
from bench.workloads import Workload


@dataclass(frozen=True)
class Measurement:
    """checks: by peer. timings: by peer, of those that passed. other_cores: kept busy by other processes meanwhile;
    None where nobody knows, or where a GPU computes. launches: by peer, where a GPU computes."""

    checks: dict[str, Check]
    timings: dict[str, Timing]
    other_cores: float | None
    launches: dict[str, int]


def measure_problem(problem: Problem, seconds: float, after_each_round: Callable[[float], None]) -> Measurement:
    """Check every peer, then time those that are right, for about this many seconds."""
    checks = check_peers(problem)
    calls = {peer: call for peer, call in problem.calls.items() if checks[peer].passed}
    start, others_before = time.perf_counter(), cpu_seconds_of_others()
    clock = CLOCKS[problem.device]
    timings = time_interleaved(calls, problem.before_each_call, seconds, after_each_round, clock)
    others_after, elapsed = cpu_seconds_of_others(), time.perf_counter() - start
    known = problem.device == "cpu" and others_before is not None and others_after is not None
    launches = {peer: launches_of(call) for peer, call in calls.items()} if problem.device == "cuda" else {}
    return Measurement(checks, timings, (others_after - others_before) / elapsed if known else None, launches)


def measure_workload(
    workload: Workload, seconds: float, machine: Machine, gemm_rate: float, after_each_round: Callable[[float], None]
) -> list[Row]:
    """The rows of one workload, one for every peer that this machine has."""
    problem = prepare(workload)
    measured = measure_problem(problem, seconds, after_each_round)
    checks, timings = measured.checks, measured.timings
    rates = Rates(copy_rate(problem, timings["copy"]), gemm_rate)
    floor = floor_ms(problem, rates)
    return [
        Row(
            **asdict(machine),
            backend=backend_of(workload.operation.op, workload.device),
            workload=workload.name,
            peer=peer,
            status=checks[peer].status,
            error=checks[peer].error,
            **_times(timings.get(peer)),
            floor_ms=floor,
            ratio_to_floor=timings[peer].median_ms / floor if peer in timings else None,
            copy_gb_per_s=1e-9 * rates.bytes_per_second,
            gemm_gflop_per_s=1e-9 * gemm_rate,
            other_cores=measured.other_cores,
            launches=measured.launches.get(peer),
        )
        for peer in problem.calls
    ]


def _times(timing: Timing | None) -> dict[str, float | int | None]:
    return asdict(timing) if timing else {"median_ms": None, "p20_ms": None, "p80_ms": None, "calls": None}
