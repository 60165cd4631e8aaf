"""Results as data: one row per workload and peer, appended to results/<device>.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.machine import ROOT

RESULTS = ROOT / "bench" / "results"
BUSY = 0.2  # cores kept busy by others; at 1 of 2, threads wait for each other and times become multiples of 4 ms


@dataclass(frozen=True)
class Row:
    """One peer on one workload, and everything that is needed to say where the number comes from.

    status: "ok", or why there is no time. error: relative to float64. floor_ms: the time that no implementation can
    beat at the rates of this run; ratio_to_floor: the median over it. backend: what answered for lgd_kernels.
    other_cores: how many cores other processes (and other guests of the host) kept busy meanwhile, None if unknown.
    launches: kernels and copies that a GPU runs in one call; None on a CPU.
    The others are those of `Machine`.
    """

    date: str
    commit: str
    device: str
    cpu: str
    isa: str
    threads: int
    torch: str
    python: str
    lgd_kernels: str
    backend: str
    workload: str
    peer: str
    status: str
    error: float | None
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    calls: int | None
    floor_ms: float
    ratio_to_floor: float | None
    copy_gb_per_s: float
    gemm_gflop_per_s: float
    other_cores: float | None
    launches: int | None

    @property
    def computes(self) -> str:
        """What computes, for a title."""
        return f"{self.cpu}, {self.threads} threads" if self.threads else self.cpu


COLUMNS = [field.name for field in fields(Row)]
_PARSERS = {"str": str, "int": int, "float": float, "int | None": int, "float | None": float}


def _text(value: str | int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parsed(record: dict[str, str]) -> Row:
    optional = {field.name: str(field.type).endswith("None") for field in fields(Row)}
    parsers = {field.name: _PARSERS[str(field.type)] for field in fields(Row)}
    return Row(**{c: None if optional[c] and not record[c] else parsers[c](record[c]) for c in COLUMNS})


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a results file, which is made if it is not there. Raises ValueError if its columns are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        _check_columns(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({column: _text(value) for column, value in asdict(row).items()} for row in rows)


def _check_columns(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        columns = next(csv.reader(file), [])
    if columns != COLUMNS:
        raise ValueError(f"{path.name}: has the columns {columns}, this version writes {COLUMNS}; move the file away")


def read_latest_run(path: Path) -> list[Row]:
    """The rows of the run that was appended last: those with the date of the last row."""
    _check_columns(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [_parsed(record) for record in csv.DictReader(file)]
    return [row for row in rows if row.date == rows[-1].date]


def read_latest_runs(folder: Path) -> list[list[Row]]:
    """The latest run of every device that has a results file."""
    runs = [read_latest_run(path) for path in sorted(folder.glob("*.csv"))]
    return [run for run in runs if run]


def by_workload(run: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """run[workload][peer], in the order in which they were measured."""
    grouped: dict[str, dict[str, Row]] = {}
    for row in run:
        grouped.setdefault(row.workload, {})[row.peer] = row
    return grouped


def busy_cores(run: Iterable[Row]) -> float:
    """The most cores that others kept busy while a workload of the run was timed; 0 where nobody knows."""
    return max(row.other_cores or 0.0 for row in run)


def medians(peers: dict[str, Row]) -> dict[str, float]:
    """The medians of those peers that have one."""
    return {peer: row.median_ms for peer, row in peers.items() if row.median_ms is not None}
