"""Results as data: one line of a CSV file per run."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from experiments.plan import Run

_RUN_COLUMNS = [field.name for field in fields(Run)]
_RUN_TYPES = {"str": str, "int": int, "float": float}


@dataclass(frozen=True)
class Result:
    """What a run measured; the rest is NaN or empty.

    Scores are of the ordinary net, in percent: the share of the labels that it gets right, or of the target's variance
    that it explains (0 where it is no better than a constant). Seconds are CPU seconds of one thread, without the time
    that it takes to judge the net.
    """

    run: Run
    date: str
    torch: str  # its version
    isa: str  # the instruction set of the CPU
    score: float = math.nan  # of the test samples, at the end
    loss: float = math.nan  # mean over the test samples, at the end
    validation_score: float = math.nan
    seconds: float = math.nan  # of training, with the burn-in
    burn_in_seconds: float = math.nan  # of these, until the first visit is over
    curve: tuple[float, ...] = ()  # score of the test samples after every epoch
    cosine: tuple[float, ...] = ()  # of every layer's gradient with backpropagation's
    norm_ratio: tuple[float, ...] = ()  # and their norms, local / backpropagation
    milliseconds: float = math.nan  # median of a minibatch in this mode
    backpropagation_milliseconds: float = math.nan  # of the same minibatch, by turns
    relative_error: tuple[float, ...] = ()  # of the gradient after T, 2 T, 4 T, ... steps of z in a net of T layers


_VALUE_COLUMNS = [field.name for field in fields(Result)][1:]
COLUMNS = [*_RUN_COLUMNS, *_VALUE_COLUMNS]


def append(path: Path, result: Result) -> None:
    """Add a line to the file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        values = {name: _text(getattr(result, name)) for name in _VALUE_COLUMNS}
        writer.writerow(asdict(result.run) | values)


def read(path: Path) -> list[Result]:
    """All results; none if there is no file. Raises ValueError if its columns are others."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: has the columns {reader.fieldnames}, expected {COLUMNS}; move the file away")
        return [_parsed(record) for record in reader]


def of_runs(results: Iterable[Result], runs: Iterable[Run]) -> list[Result]:
    """The results of these runs, in the order of the runs; those of earlier plans are left out."""
    by_run = {result.run: result for result in results}
    return [by_run[run] for run in runs if run in by_run]


def _text(value: str | float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{number:.4g}" for number in value)
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _parsed(record: dict[str, str]) -> Result:
    run = Run(**{field.name: _RUN_TYPES[str(field.type)](record[field.name]) for field in fields(Run)})
    values = {}
    for field in fields(Result)[1:]:
        text = record[field.name]
        if field.type == "float":
            values[field.name] = float(text) if text else math.nan
        else:
            is_list = str(field.type).startswith("tuple")
            values[field.name] = tuple(map(float, text.split())) if is_list else text
    return Result(run, **values)
