"""The pictures, one for every experiment, and one of learning curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.plan import TITLES, Experiment
from experiments.problems import DATA, NETS
from experiments.results import Result
from experiments.statistics import ByMode, Case, by_case, estimate

CURVES_AT = 32  # layers

# of the palette of Okabe and Ito, which is safe for the colour-blind
COLORS = {
    "backpropagation": "#444444",
    "stored": "#0072b2",
    "stored_multipliers": "#d55e00",
    "reinitialized": "#009e73",
    "one_step": "#cc79a7",
}


def _save(figure: Figure, path: Path) -> None:
    for ax in figure.axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _layers_axis(ax: Axes, layers: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(layers, [str(n) for n in layers])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("layers")


def _plain_numbers(axis: Axis) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def scores(results: list[Result], experiment: Experiment, path: Path) -> None:
    """Mean and standard error of the score against depth; a panel for every data set and kind of net."""
    cases = by_case(results, experiment)
    panels = list(dict.fromkeys((case.data, case.net) for case in cases))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.5 + 5 * len(panels), 4.2), layout="constrained")
    for (data, net), ax in zip(panels, np.atleast_1d(axes), strict=True):
        of_panel = {case.layers: by_mode for case, by_mode in cases.items() if (case.data, case.net) == (data, net)}
        for mode in experiment.modes:
            _draw_scores(ax, of_panel, mode)
        _layers_axis(ax, sorted(of_panel))
        ax.set(title=f"{DATA[data].title}, {NETS[net].title}", ylabel="test score (%)")
    np.atleast_1d(axes)[0].legend(frameon=False)
    _save(figure, path)


def _draw_scores(ax: Axes, by_layers: dict[int, ByMode], mode: str) -> None:
    estimates = {
        layers: estimate(r.score for r in by_mode[mode]) for layers, by_mode in by_layers.items() if mode in by_mode
    }
    if estimates:
        means, errors = zip(*((e.mean, e.error) for e in estimates.values()), strict=True)
        ax.errorbar(list(estimates), means, errors, color=COLORS[mode], label=TITLES[mode], marker="o", capsize=3)


def curves(results: list[Result], experiment: Experiment, path: Path) -> None:
    """The mean score over the epochs, and over the mean CPU seconds."""
    by_mode = by_case(results, experiment)[Case("digits", "residual", CURVES_AT)]
    figure, (over_epochs, over_seconds) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for mode, of_mode in by_mode.items():
        mean = np.mean([r.curve for r in of_mode], axis=0)
        style = {"color": COLORS[mode], "label": TITLES[mode]}
        over_epochs.plot(range(1, len(mean) + 1), mean, **style)
        over_seconds.plot(np.mean([seconds_of_epochs(r) for r in of_mode], axis=0), mean, **style)
    over_epochs.set(title=f"{CURVES_AT} layers: the same epochs", xlabel="epoch", ylabel="test score (%)")
    over_seconds.set(title="the same seconds", xlabel="CPU seconds of one thread", xscale="log")
    _plain_numbers(over_seconds.xaxis)
    over_epochs.legend(frameon=False)
    _save(figure, path)


def seconds_of_epochs(result: Result) -> list[float]:
    """When each epoch was over; all of them take the same time."""
    epochs, burn_in = len(result.curve), result.burn_in_seconds
    return [burn_in + (result.seconds - burn_in) * (epoch + 1) / epochs for epoch in range(epochs)]


# ---------------------------------------------------------------------------------------------------------------------
# One minibatch
# ---------------------------------------------------------------------------------------------------------------------


def gradients(results: list[Result], experiment: Experiment, path: Path) -> None:
    """Cosine and norm ratio of every layer, a line for every depth: means over seeds."""
    figure, (cosine, ratio) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_layers = _by_layers(results)
    for color, (layers, of_depth) in zip(_colors(by_layers), by_layers.items(), strict=True):
        place = np.linspace(0, 1, layers)
        style = {"color": color, "label": f"{layers} layers", "marker": "."}
        cosine.plot(place, np.mean([r.cosine for r in of_depth], axis=0), **style)
        ratio.plot(place, np.mean([r.norm_ratio for r in of_depth], axis=0), **style)
    x_label = "place of the layer: 0 is next to the input, 1 is the output"
    cosine.set(title="Cosine with backpropagation's gradient", xlabel=x_label, ylabel="cosine")
    ratio.set(title="Norm over that of backpropagation's", xlabel=x_label, ylabel="ratio")
    for ax in (cosine, ratio):
        ax.axhline(1, color="#888888", linewidth=0.8)
    cosine.legend(frameon=False)
    _save(figure, path)


def costs(results: list[Result], experiment: Experiment, path: Path) -> None:
    """The time of a minibatch over that of a step of backpropagation, against depth."""
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for mode in experiment.modes:
        by_layers = _by_layers([r for r in results if r.run.mode == mode])
        if by_layers:
            estimates = [estimate(cost_ratio(r) for r in of_depth) for of_depth in by_layers.values()]
            means, errors = zip(*((e.mean, e.error) for e in estimates), strict=True)
            ax.errorbar(list(by_layers), means, errors, color=COLORS[mode], label=TITLES[mode], marker="o", capsize=3)
    ax.axhline(1, color=COLORS["backpropagation"], linewidth=0.8)
    ax.set(title="Time of a minibatch / time of a step of backpropagation (CPU)", ylabel="ratio")
    ax.set_yscale("log")
    _plain_numbers(ax.yaxis)
    _layers_axis(ax, sorted(_by_layers(results)))
    ax.legend(frameon=False)
    _save(figure, path)


def cost_ratio(result: Result) -> float:
    return result.milliseconds / result.backpropagation_milliseconds


def errors_of_linear_nets(results: list[Result], experiment: Experiment, path: Path) -> None:
    """The relative error of the gradient against the steps of z, a line for every seed."""
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    by_layers = _by_layers(results)
    for color, (layers, of_depth) in zip(_colors(by_layers), by_layers.items(), strict=True):
        for i, r in enumerate(of_depth):
            steps = [layers * 2**k for k in range(len(r.relative_error))]
            ax.plot(steps, r.relative_error, color=color, marker=".", label=f"{layers} layers" if i == 0 else None)
    ax.axhline(1e-4, color="#888888", linewidth=0.8, linestyle="--")
    ax.set(title="Gradient of linear nets against backpropagation's", xscale="log", yscale="log")
    ax.set(xlabel="steps of z", ylabel="relative error")
    ax.legend(frameon=False)
    _save(figure, path)


def _by_layers(results: list[Result]) -> dict[int, list[Result]]:
    depths = sorted({r.run.layers for r in results})
    return {layers: [r for r in results if r.run.layers == layers] for layers in depths}


def _colors(of: dict) -> list:
    return list(matplotlib.colormaps["viridis_r"](np.linspace(0.15, 1, max(len(of), 1))))
