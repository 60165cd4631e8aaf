"""The README's table, generated from the latest run of every device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.goals import AtLeast, Verdict, judge
from bench.peers import TITLES
from bench.results import BUSY, Row, busy_cores, by_workload, medians, read_latest_runs
from bench.workloads import WORKLOADS, Workload

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_PEERS = ("copy", "eager", "compiled", "ours")
_MARK = {True: "✓", False: "✗ missed", None: "not measured"}


def three_digits(value: float) -> str:
    """A number with three significant digits and no exponent."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.3g}" if value < 1 else f"{value:.{decimals}f}"


def markdown_table(run: list[Row], workloads: Iterable[Workload]) -> str:
    """One device: its times in ms, our speed-ups and the goals, one line per workload of the run."""
    measured = by_workload(run)
    titles = ["loss + gradient", *(TITLES[peer] for peer in _PEERS), "times its floor", "goals"]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 2) + "|---|"]
    lines += [_line(workload, measured[workload.name]) for workload in workloads if workload.name in measured]
    return "\n".join(lines)


def _line(workload: Workload, peers: dict[str, Row]) -> str:
    ratio = peers["ours"].ratio_to_floor
    cells = [workload.label, *(_time(peer, peers) for peer in _PEERS), "—" if ratio is None else three_digits(ratio)]
    goals = "; ".join(_goal(verdict) for verdict in judge(workload.goals, medians(peers)))
    return f"| {' | '.join(cells)} | {goals} |"


def _time(peer: str, peers: dict[str, Row]) -> str:
    row = peers.get(peer)
    if row is None or row.median_ms is None:
        return "—"
    if peer == "ours":
        return f"**{three_digits(row.median_ms)}**"
    ours = peers["ours"].median_ms
    if peer == "copy" or ours is None:
        return three_digits(row.median_ms)
    return f"{three_digits(row.median_ms)} ({row.median_ms / ours:.1f}x)"


def _goal(verdict: Verdict) -> str:
    goal = verdict.goal
    text = f"≥ {goal.times:g}x {TITLES[goal.peer]}" if isinstance(goal, AtLeast) else f"≤ {goal.times:g} copies"
    measured = "" if verdict.ratio is None else f": {verdict.ratio:.2f}"
    return f"{text}{measured} {_MARK[verdict.met]}"


def section(run: list[Row], workloads: Iterable[Workload]) -> str:
    """One device: what was measured where, the table, and the picture."""
    row, others = run[0], busy_cores(run)
    warning = f" **Measured while other processes kept up to {others:.1f} cores busy.**" if others > BUSY else ""
    return (
        f"**{row.cpu}, {row.threads} threads, {row.isa}** (torch {row.torch}, lgd_kernels {row.lgd_kernels} at "
        f"`{row.commit}`, {row.date[:10]}). Milliseconds, medians; in brackets how many times as fast lgd_kernels is. "
        f"The floor is one read and one write of the logits and one read of H, at the rate at which a copy of the "
        f"logits ran in the same run. Percentiles, errors and versions: [bench/results/{row.device}.csv]"
        f"(bench/results/{row.device}.csv).{warning}\n\n"
        f"{markdown_table(run, workloads)}\n\n"
        f"![Time of every peer, as a multiple of a copy of the logits](bench/results/{row.device}.png)"
    )


def with_table(text: str, table: str, name: str) -> str:
    """The text with the table between the markers. Raises ValueError if they are not there, once each and in order."""
    begin, end = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or end < begin:
        raise ValueError(f"{name}: needs one line {BEGIN} and after it one line {END}; the table goes between them")
    return f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}"


def update_readme(readme: Path, results: Path) -> None:
    """Write the latest run of every device into the README. Raises ValueError without a README, markers or results."""
    if not readme.exists():
        raise ValueError(f"{readme.name}: not found; it needs the lines {BEGIN} and {END} for the table")
    runs = read_latest_runs(results)
    if not runs:
        raise ValueError("no results yet: run `python -m bench` first")
    table = "\n\n".join(section(run, WORKLOADS) for run in runs)
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), table, readme.name), encoding="utf-8")
