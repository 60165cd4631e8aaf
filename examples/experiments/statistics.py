"""Means over seeds with their standard errors, and the choice of a learning rate."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from experiments.plan import Experiment
from experiments.results import Result


class Estimate(NamedTuple):
    """Of the mean of something over seeds."""

    mean: float
    error: float  # standard error of the mean; NaN for a single seed
    n: int

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.1f}"
        return f"{self.mean:.1f}{error}"


def estimate(values: Iterable[float]) -> Estimate:
    """Of at least one value. The error is the sample's standard deviation over sqrt(n)."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error, len(values))


class Case(NamedTuple):
    """What several modes are compared on."""

    data: str
    net: str
    layers: int


ByMode = dict[str, list[Result]]  # of a case: one result per seed, all with the same learning rate


def by_case(results: Iterable[Result], experiment: Experiment) -> dict[Case, ByMode]:
    """The results of an experiment that count, in the order of its table.

    A seed counts for a mode when all learning rates are in; of these the one with the highest mean validation score is
    taken, for all seeds the same. Nothing about the test samples decides.
    """
    grids: dict[tuple[Case, str], dict[int, dict[float, Result]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        run = result.run
        if run.experiment == experiment.name:
            case = Case(run.data, run.net, run.layers)
            grids[case, run.mode][run.seed][run.learning_rate] = result
    cases: dict[Case, ByMode] = defaultdict(dict)
    for (case, mode), seeds in grids.items():
        whole = [grid for grid in seeds.values() if len(grid) == len(experiment.learning_rates)]
        if whole:
            cases[case][mode] = [grid[_best_rate(whole)] for grid in whole]
    return dict(sorted(cases.items(), key=lambda item: (item[0].data, item[0].net, item[0].layers)))


def _best_rate(grids: list[dict[float, Result]]) -> float:
    """The lowest of the best ones; where there is one, that."""
    rates = sorted(grids[0])
    if len(rates) == 1:
        return rates[0]
    return max(rates, key=lambda rate: statistics.fmean(grid[rate].validation_score for grid in grids))


def difference(results: list[Result], baseline: list[Result]) -> Estimate | None:
    """Of score - score of the baseline, over the seeds that both have; None if there is none."""
    of_baseline = {result.run.seed: result.score for result in baseline}
    common = [r.score - of_baseline[r.run.seed] for r in results if r.run.seed in of_baseline]
    return estimate(common) if common else None
