"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from bench.goals import Verdict, judge
from bench.results import BUSY, Row, busy_cores, by_workload, medians
from bench.workloads import Workload

_HEADER = f"{'':15}{'median ms':>11}{'p20':>9}{'p80':>9}{'x floor':>9}{'x copy':>8}{'ours is':>15}{'error':>10}"
_LAUNCHES = f"{'launches':>10}"  # on a GPU


def report(run: list[Row], workloads: Iterable[Workload]) -> str:
    """Every time of a run, and under each workload its goals."""
    first, measured = run[0], by_workload(run)
    lines = [
        f"{first.computes}, {first.isa}; torch {first.torch}; lgd_kernels {first.lgd_kernels} "
        f"({first.backend}) at {first.commit}; GEMM {first.gemm_gflop_per_s:.0f} GFLOP/s"
    ]
    workloads = [workload for workload in workloads if workload.name in measured]
    for workload in workloads:
        lines += ["", *_workload_lines(workload, measured[workload.name])]
    return "\n".join([*lines, "", summary(run, workloads)])


def _workload_lines(workload: Workload, peers: dict[str, Row]) -> list[str]:
    copy = peers["copy"]
    title = f"{workload.label}   floor {copy.floor_ms:.3g} ms at a copy rate of {copy.copy_gb_per_s:.1f} GB/s"
    verdicts = judge(workload.goals, medians(peers))
    header = _HEADER if copy.launches is None else _HEADER + _LAUNCHES
    return [title, header, *(_peer_line(row, peers) for row in peers.values()), *map(_goal_line, verdicts)]


def _peer_line(row: Row, peers: dict[str, Row]) -> str:
    if row.median_ms is None:
        return f"  {row.peer:13} {row.status}"
    ours, copy = peers["ours"].median_ms, peers["copy"].median_ms
    error = "-" if row.error is None else f"{row.error:.1e}"
    faster = "" if row.peer == "ours" or ours is None else f"{row.median_ms / ours:.2f}x as fast"
    launches = "" if row.launches is None else f"{row.launches:10}"
    return (
        f"  {row.peer:13}{row.median_ms:11.4g}{row.p20_ms:9.4g}{row.p80_ms:9.4g}{row.ratio_to_floor:9.2f}"
        f"{row.median_ms / copy:8.2f}{faster:>15}{error:>10}{launches}"
    )


def _goal_line(verdict: Verdict) -> str:
    ratio = "" if verdict.ratio is None else f": {verdict.ratio:.2f}"
    return f"  goal {verdict.word:13} {verdict.goal}{ratio}"


def summary(run: list[Row], workloads: Iterable[Workload]) -> str:
    """How many goals are met, which peers are not timed, and whether the machine was busy."""
    measured = by_workload(run)
    verdicts = [v for workload in workloads for v in judge(workload.goals, medians(measured[workload.name]))]
    lines = [f"{sum(verdict.met is True for verdict in verdicts)} of {len(verdicts)} goals met"] if verdicts else []
    lines += [f"not timed: {row.peer} on {row.workload}: {row.status}" for row in run if row.median_ms is None]
    missing = {peer for workload in workloads for peer in workload.peers if peer not in measured[workload.name]}
    if missing:
        lines.append(f"not on this machine: {', '.join(sorted(missing))}")
    if busy_cores(run) > BUSY:
        lines.append(f"DO NOT TRUST THESE TIMES: other processes kept up to {busy_cores(run):.1f} cores busy")
    return "\n".join(lines)
