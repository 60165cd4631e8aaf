"""The README's table, generated from the latest run of every device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bench.goals import AtLeast, Verdict, judge
from bench.operations import Operation
from bench.results import BUSY, Row, busy_cores, by_workload, medians, read_latest_runs
from bench.workloads import WORKLOADS, Workload, is_sweep

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_MARK = {True: "✓", False: "✗ missed", None: "not measured"}


def three_digits(value: float) -> str:
    """A number with three significant digits and no exponent."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.3g}" if value < 1 else f"{value:.{decimals}f}"


def markdown_table(run: list[Row], workloads: Iterable[Workload]) -> str:
    """One device, workloads of one operation: its times in ms, our speed-ups and the goals, a line for each."""
    measured = by_workload(run)
    shown = [workload for workload in workloads if workload.name in measured]
    operation = shown[0].operation
    peers = [peer for peer in operation.titles if any(peer in measured[workload.name] for workload in shown)]
    titles = [operation.heading, *(operation.titles[peer] for peer in peers), "times its floor", "goals"]
    lines = [f"| {' | '.join(titles)} |", "|---" + "|---:" * (len(titles) - 2) + "|---|"]
    lines += [_line(workload, peers, measured[workload.name]) for workload in shown]
    return "\n".join(lines)


def _line(workload: Workload, shown: list[str], peers: dict[str, Row]) -> str:
    ratio = peers["ours"].ratio_to_floor
    cells = [workload.label, *(_time(peer, peers) for peer in shown), "—" if ratio is None else three_digits(ratio)]
    verdicts = judge(workload.goals, medians(peers))
    return f"| {' | '.join(cells)} | {'; '.join(_goal(verdict, workload.operation) for verdict in verdicts)} |"


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


def _goal(verdict: Verdict, operation: Operation) -> str:
    goal = verdict.goal
    sign = "≥" if isinstance(goal, AtLeast) else "≤"
    text = f"{sign} {goal.times:g}x {operation.titles[goal.peer]}"
    measured = "" if verdict.ratio is None else f": {verdict.ratio:.2f}"
    return f"{text}{measured} {_MARK[verdict.met]}"


def section(run: list[Row], workloads: Iterable[Workload]) -> str:
    """One device: what was measured where, and for each operation a table and a picture."""
    row, others = run[0], busy_cores(run)
    warning = f" **Measured while other processes kept up to {others:.1f} cores busy.**" if others > BUSY else ""
    head = (
        f"**{row.computes}, {row.isa}** (torch {row.torch}, lgd_kernels {row.lgd_kernels} at "
        f"`{row.commit}`, {row.date[:10]}). Milliseconds, medians; in brackets how many times as fast lgd_kernels is. "
        f"Percentiles, errors and versions: [bench/results/{row.device}.csv](bench/results/{row.device}.csv).{warning}"
    )
    parts = [head]
    for operation, of_operation in by_operation(run, workloads).items():
        tables = [markdown_table(run, of_operation)]
        pictures = [
            f"![{title}](bench/results/{name})" for name, title in pictures_of(operation, of_operation, row.device)
        ]
        parts += [operation.floor, *tables, *pictures]
    return "\n\n".join(parts)


def by_operation(run: list[Row], workloads: Iterable[Workload]) -> dict[Operation, list[Workload]]:
    """The workloads of the run that have results, by their operation."""
    measured = by_workload(run)
    grouped: dict[Operation, list[Workload]] = {}
    for workload in workloads:
        if workload.name in measured:
            grouped.setdefault(workload.operation, []).append(workload)
    return grouped


def pictures_of(operation: Operation, workloads: list[Workload], device: str) -> list[tuple[str, str]]:
    """(file name, title) of the pictures of an operation: of its workloads, and of its sweep over depths if it has."""
    unit = operation.titles[operation.unit]
    pictures = [(f"{device}-{operation.name}.png", f"{operation.heading}: time of every peer over that of {unit}")]
    if any(is_sweep(workload) for workload in workloads):
        pictures.append((f"{device}-{operation.name}-depth.png", f"{operation.heading}: time against depth"))
    return pictures


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
