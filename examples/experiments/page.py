"""The page around the pictures. Every number in it comes from the results: nothing is typed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from experiments import figures
from experiments.findings import NOTABLE, Finding, findings, goals
from experiments.measure import CONVERGED, PAIRS
from experiments.plan import BATCH_SIZE, MODES, TITLES, WIDTH, Experiment, Run, runs_of
from experiments.problems import DATA, NETS
from experiments.results import Result, of_runs, read
from experiments.statistics import by_case, estimate

MISSING = "not measured yet"

Draw = Callable[[list[Result], Experiment, Path], None]
Tabulate = Callable[[list[Result], Experiment], list[str]]


class Section(NamedTuple):
    title: str
    experiment: str
    picture: str
    text: str
    draw: Draw
    tabulate: Tabulate
    needs: Callable[[Run], bool] = lambda run: True  # which runs it is about


def write(results_path: Path, page: Path, experiments: Iterable[Experiment]) -> None:
    """Draw everything that there are results for beside them, and write the page."""
    experiments = {experiment.name: experiment for experiment in experiments}
    runs = runs_of(tuple(experiments.values()))
    results = of_runs(read(results_path), runs)
    link = Path(os.path.relpath(results_path, page.parent)).as_posix()
    parts = [_head(results, len(runs), link), _goals(results, experiments)]
    for number, section in enumerate(SECTIONS, 1):
        if section.experiment in experiments:
            experiment = experiments[section.experiment]
            parts.append(_section(number, section, experiment, results, results_path.parent, page.parent))
    parts.append(_where_not(findings(results, experiments)))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(results: list[Result], n_runs: int, link: str) -> str:
    versions = ", ".join(sorted({f"torch {r.torch} ({r.isa})" for r in results}))
    hours = sum(r.seconds for r in results) / 3600
    measured = f" {hours:.2f} CPU hours so far; {versions}." if results else ""
    return (
        "# Does decoupled training reach what backpropagation reaches?\n\n"
        f"`python examples/evidence.py` goes on with the experiments and writes this page from [{link}]({link}), in "
        f"which every run is a line. **{len(results)} of {n_runs} runs are in.**{measured}\n\n"
        "Numbers are means over seeds ± standard error of the mean, in brackets the number of seeds. A seed fixes the "
        f"weights and the order of the samples, in minibatches of {BATCH_SIZE}, with Adam and a learning rate that "
        "falls to 0 along a cosine (that of biases times the scale of their branch: `parameter_groups`). Scores are of "
        "test samples, in percent: the share of right labels, or for a regression of the variance explained. Net and "
        "data are the same for all modes:\n\n"
        f"- {TITLES['backpropagation']};\n"
        f"- {TITLES['stored']}: `StoredValues(multipliers=False)`;\n"
        f"- {TITLES['stored_multipliers']}: `StoredValues()`, both with {_visits('stored')} for every minibatch;\n"
        f"- {TITLES['reinitialized']}: `ReinitializedValues()`, with 4 steps of z for every layer and multipliers that "
        "begin at 0 in every visit."
    )


def _visits(mode: str) -> str:
    return f"{MODES[mode].visits} visits of {MODES[mode].steps} steps of z"


def _goals(results: list[Result], experiments: dict[str, Experiment]) -> str:
    lines = ["## Goals, set before the measurements", "", "| goal | found | seeds | verdict |", "|---|---|---:|---|"]
    lines += [
        f"| {goal.text} | {goal.found or '—'} | {goal.seeds} of {goal.of_seeds} | {goal.verdict} |"
        for goal in goals(results, experiments)
    ]
    return "\n".join(lines)


def _section(
    number: int, section: Section, experiment: Experiment, results: list[Result], pictures: Path, folder: Path
) -> str:
    title = f"## {number}. {section.title}\n\n{section.text}"
    runs = [run for seed in range(experiment.seeds) for run in experiment.runs(seed)]
    mine = [r for r in of_runs(results, runs) if section.needs(r.run)]
    table = section.tabulate(mine, experiment)
    if not table:
        return f"{title}\n\n*{MISSING.capitalize()}.*"
    path = pictures / section.picture
    section.draw(mine, experiment, path)
    link = Path(os.path.relpath(path, folder)).as_posix()
    begun, n_runs = len({r.run.seed for r in mine}), sum(map(section.needs, runs))
    state = f"{len(mine)} of {n_runs} runs are in, of {begun} of {experiment.seeds} seeds.{_settings(experiment)}"
    return "\n".join([title, "", f"![{section.title}]({link})", "", state, "", *table])


def _settings(experiment: Experiment) -> str:
    if not experiment.epochs:
        return ""
    rates = ", ".join(f"{rate:g}" for rate in experiment.learning_rates)
    return f" {experiment.epochs} epochs, learning rate {rates}."


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]], n_words: int) -> list[str]:
    """Columns of words at the left, of numbers behind them; nothing without rows."""
    rule = ["---"] * n_words + ["---:"] * (len(head) - n_words)
    return [f"| {' | '.join(cells)} |" for cells in [head, rule, *rows]] if rows else []


def _scores(results: list[Result], experiment: Experiment) -> list[str]:
    head = ["data", "nets", "layers", *(TITLES[mode] for mode in experiment.modes)]
    rows = [
        [
            *(DATA[case.data].title, NETS[case.net].title, str(case.layers)),
            *(_score(by_mode.get(mode), experiment, mode, case.layers) for mode in experiment.modes),
        ]
        for case, by_mode in by_case(results, experiment).items()
    ]
    return _table(head, rows, 2)


def _score(results: list[Result] | None, experiment: Experiment, mode: str, layers: int) -> str:
    if layers > experiment.deepest.get(mode, layers):
        return "left out"
    if not results:
        return MISSING
    of_scores = estimate(r.score for r in results)
    rate = f", rate {results[0].run.learning_rate:g}" if experiment.is_tuned else ""
    return f"{of_scores} ({of_scores.n}{rate})"


def _curves(results: list[Result], experiment: Experiment) -> list[str]:
    """Scores at the end, and when the fastest mode was done."""
    by_mode = next(iter(by_case(results, experiment).values()), {})
    if not by_mode:
        return []
    seconds = {mode: estimate(r.seconds for r in of_mode).mean for mode, of_mode in by_mode.items()}
    fastest = min(seconds.values()) + 1e-9  # for the rounding of the last epoch's end
    head = ["mode", "CPU seconds", "of it burn-in", f"score after {experiment.epochs} epochs", f"after {fastest:.0f} s"]
    rows = [
        [
            *(TITLES[mode], f"{seconds[mode]:.0f}", f"{estimate(r.burn_in_seconds for r in of_mode).mean:.1f}"),
            str(estimate(r.score for r in of_mode)),
            _score_at(of_mode, fastest),
        ]
        for mode, of_mode in by_mode.items()
    ]
    return _table(head, rows, 1)


def _score_at(results: list[Result], seconds: float) -> str:
    """After the last epoch that was over by then."""
    done = [sum(end <= seconds for end in figures.seconds_of_epochs(r)) for r in results]  # epochs
    if 0 in done:
        return "no epoch yet"
    return str(estimate(r.curve[epochs - 1] for r, epochs in zip(results, done, strict=True)))


def _gradients(results: list[Result], experiment: Experiment) -> list[str]:
    head = ["layers", "smallest cosine", "smallest norm ratio", "largest norm ratio", "seeds"]
    rows = []
    for layers in experiment.layers:
        of_depth = [r for r in results if r.run.layers == layers]
        if of_depth:
            cosine = min(min(r.cosine[:-1]) for r in of_depth)
            low = min(min(r.norm_ratio[:-1]) for r in of_depth)
            high = max(max(r.norm_ratio[:-1]) for r in of_depth)
            rows.append([str(layers), f"{cosine:.3f}", f"{low:.2f}", f"{high:.2f}", str(len(of_depth))])
    return _table(head, rows, 0)


def _costs(results: list[Result], experiment: Experiment) -> list[str]:
    head = ["layers", *(TITLES[mode] for mode in experiment.modes), "backpropagation, ms", "repetitions"]
    rows = []
    for layers in experiment.layers:
        of_depth = [r for r in results if r.run.layers == layers]
        if of_depth:
            ratios = {m: [figures.cost_ratio(r) for r in of_depth if r.run.mode == m] for m in experiment.modes}
            cells = [f"{estimate(values).mean:.2f}" if values else MISSING for values in ratios.values()]
            step = estimate(r.backpropagation_milliseconds for r in of_depth).mean
            rows.append([str(layers), *cells, f"{step:.2f}", str(max(map(len, ratios.values())))])
    return _table(head, rows, 0)


def _linear(results: list[Result], experiment: Experiment) -> list[str]:
    head = ["layers", "relative error in the end, largest of the seeds", "steps of z", "seeds"]
    rows = []
    for layers in experiment.layers:
        of_depth = [r for r in results if r.run.layers == layers]
        if of_depth:
            worst = max(r.relative_error[-1] for r in of_depth)
            steps = max(layers * 2 ** (len(r.relative_error) - 1) for r in of_depth)
            rows.append([str(layers), f"{worst:.1g}", f"{steps:,}", str(len(of_depth))])
    return _table(head, rows, 0)


# ---------------------------------------------------------------------------------------------------------------------
# What it does not do
# ---------------------------------------------------------------------------------------------------------------------


def _where_not(found: list[Finding]) -> str:
    worse = [f for f in found if f.points.mean < -NOTABLE]
    better = [f for f in found if f.points.mean > NOTABLE]
    parts = ["## Where it does not work", f"Decoupled modes more than {NOTABLE:g} point below backpropagation:"]
    parts.append(_list(worse, found))
    parts.append(f"And those more than {NOTABLE:g} point above it:")
    parts.append(_list(better, found))
    return "\n\n".join(parts)


def _list(notable: list[Finding], found: list[Finding]) -> str:
    if not found:
        return f"*{MISSING.capitalize()}.*"
    lines = [
        f"- {DATA[f.case.data].title}, {NETS[f.case.net].title}, {f.case.layers} layers, {TITLES[f.mode]}: "
        f"{'+' if f.points.mean > 0 else ''}{f.points} points ({f.points.n})"
        for f in sorted(notable, key=lambda f: f.points.mean)
    ]
    return "\n".join(lines) or f"none of the {len(found)} measured so far."


SECTIONS = (
    Section(
        "Score against depth",
        "depth",
        "depth.png",
        f"Residual ReLU nets of width {WIDTH} in the parameterisation of `residual_net`; the last layer makes the "
        "output, so that a net of T layers has T - 1 hidden values. The re-initialised mode takes 4 steps of z for "
        "every layer in each visit, and is left out where that takes too long.",
        figures.scores,
        _scores,
    ),
    Section(
        "The same budget in epochs and in seconds",
        "depth",
        "curves.png",
        f"The runs of section 1 at {figures.CURVES_AT} layers. Seconds are CPU seconds of one thread, without judging "
        "the net. The learning rate falls along the epochs, so that a curve which is cut at some second had not come "
        "to the end of its own schedule.",
        figures.curves,
        _curves,
        lambda run: run.layers == figures.CURVES_AT,
    ),
    Section(
        "A table and a regression",
        "other_data",
        "other_data.png",
        "The same nets and settings on scikit-learn's breast cancer data and on the synthetic regression Friedman 1, "
        "there with the squared head. Nothing was tuned for them.",
        figures.scores,
        _scores,
    ),
    Section(
        "Vanishing and exploding gradients",
        "scale",
        "scale.png",
        "Digits; tanh nets without skips, with weights at half and at three times the usual scale 1 / sqrt(fan-in). "
        "Every mode gets the same learning rates and the same number of runs. For each the rate with the best mean "
        "score of validation samples counts, which are taken from those for training; a seed counts when all of its "
        "rates are in.",
        figures.scores,
        _scores,
    ),
    Section(
        "Gradient of the re-initialised mode against backpropagation's",
        "gradient",
        "gradient.png",
        "At initialisation, for a minibatch of digits: cosine and norm ratio of every layer. The table has the worst "
        "hidden layer of all seeds: every layer but the last one.",
        figures.gradients,
        _gradients,
    ),
    Section(
        "Linear nets",
        "linear",
        "linear.png",
        f"With linear layers and the squared head the method of multipliers must end where backpropagation is. Nets of "
        f"width {NETS['linear'].width} in float64, from the values of the net fed forward and multipliers of 0; the "
        f"weights do not move. The measurement stops at an error below {CONVERGED:g}.",
        figures.errors_of_linear_nets,
        _linear,
    ),
    Section(
        "Cost of a step against depth",
        "cost",
        "cost.png",
        f"The CPU time of what a mode does with a minibatch of {BATCH_SIZE} samples over that of a step of "
        f"backpropagation, nets of width {WIDTH}, Adam: **a ratio on a CPU with one thread**. Both by turns in one "
        f"run, medians of {PAIRS}. Stored z takes {_visits('stored')} where it does not say otherwise. Without the "
        "store's gather and scatter.",
        figures.costs,
        _costs,
    ),
)
