"""What the numbers say: whether the goals are met, and where decoupled training is better or worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from experiments.plan import Experiment
from experiments.results import Result
from experiments.statistics import Case, Estimate, by_case, difference

NOTABLE = 1.0  # points

Experiments = dict[str, Experiment]


class Finding(NamedTuple):
    """A mode against backpropagation in one case."""

    experiment: str
    case: Case
    mode: str
    points: Estimate  # score - score of backpropagation, over the seeds that both have


def findings(results: list[Result], experiments: Experiments) -> list[Finding]:
    """Every decoupled mode in every case in which backpropagation was measured too."""
    return [
        Finding(name, case, mode, points)
        for name, experiment in experiments.items()
        if experiment.measure == "training"
        for case, by_mode in by_case(results, experiment).items()
        for mode, of_mode in by_mode.items()
        if mode != "backpropagation"
        for points in [difference(of_mode, by_mode.get("backpropagation", []))]
        if points is not None
    ]


class Goal(NamedTuple):
    text: str
    found: str  # "" if nothing is measured yet
    is_met: bool
    seeds: int
    of_seeds: int

    @property
    def verdict(self) -> str:
        if not self.found:
            return "not measured yet"
        return ("met" if self.is_met else "**missed**") + (" so far" if self.seeds < self.of_seeds else "")


def goals(results: list[Result], experiments: Experiments) -> list[Goal]:
    """What was set before anything was measured."""
    of_gradient, of_linear = experiments["gradient"], experiments["linear"]
    return [
        _accuracy_goal(results, experiments, layers=32, points=1.0),
        _accuracy_goal(results, experiments, layers=128, points=2.5),
        _gradient_goal(
            results,
            of_gradient,
            "re-initialised z, 32 layers: cosine at least 0.95 in every hidden layer",
            lambda r: min(r.cosine[:-1]),
            min,
            lambda value: value >= 0.95,
        ),
        _gradient_goal(
            results,
            of_gradient,
            "the same: norm ratio at least 0.5",
            lambda r: min(r.norm_ratio[:-1]),
            min,
            lambda value: value >= 0.5,
        ),
        _gradient_goal(
            results,
            of_gradient,
            "the same: norm ratio at most 2",
            lambda r: max(r.norm_ratio[:-1]),
            max,
            lambda value: value <= 2,
        ),
        _linear_goal(results, of_linear),
    ]


def _accuracy_goal(results: list[Result], experiments: Experiments, *, layers: int, points: float) -> Goal:
    text = f"digits, {layers} layers: stored z and multipliers at most {points:.1f} points below backpropagation"
    case, of_seeds = Case("digits", "residual", layers), experiments["depth"].seeds
    for finding in findings(results, experiments):
        if (finding.experiment, finding.case, finding.mode) == ("depth", case, "stored_multipliers"):
            mean = finding.points.mean
            return Goal(text, f"{mean:+.1f} points", mean >= -points, finding.points.n, of_seeds)
    return Goal(text, "", False, 0, of_seeds)


def _gradient_goal(
    results: list[Result],
    experiment: Experiment,
    text: str,
    of_result: Callable[[Result], float],
    worst: Callable[[list[float]], float],
    is_met: Callable[[float], bool],
) -> Goal:
    values = [of_result(r) for r in results if r.run.experiment == experiment.name and r.run.layers == 32]
    if not values:
        return Goal(text, "", False, 0, experiment.seeds)
    value = worst(values)
    return Goal(text, f"{value:.3f}, the worst of all seeds", is_met(value), len(values), experiment.seeds)


def _linear_goal(results: list[Result], experiment: Experiment) -> Goal:
    text = "linear nets: relative error of the weights' gradient below 1e-4, in float64, in the end"
    of_linear = [r for r in results if r.run.experiment == experiment.name]
    if not of_linear:
        return Goal(text, "", False, 0, experiment.seeds)
    worst = max(r.relative_error[-1] for r in of_linear)
    n_whole = len(of_linear) // len(experiment.layers)  # seeds with all depths
    return Goal(text, f"{worst:.1g}, the worst of all", worst < 1e-4, n_whole, experiment.seeds)
