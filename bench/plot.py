"""The pictures: the time of every peer relative to one of them for every workload, and time against depth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.operations import DECOUPLED_STEP, Operation
from bench.results import Row, by_workload, medians, read_latest_runs
from bench.table import by_operation, pictures_of, three_digits
from bench.workloads import WORKLOADS, DecoupledStepWorkload, Workload, is_sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of the palette of Okabe and Ito, which is safe for the colour-blind
COLOURS = {
    "eager": "#B8BCC2",
    "batched": "#888D94",
    "compiled": "#56B4E9",
    "liger": "#CC79A7",
    "cuda": "#E69F00",
    "triton": "#F0E442",
    "bmm": "#B7DCC9",
    "bmm_compiled": "#009E73",
    "ours": "#D55E00",
}
_INK, _PALE = "#24292F", "#D0D4D9"


# ---------------------------------------------------------------------------------------------------------------------
# Every workload of an operation
# ---------------------------------------------------------------------------------------------------------------------


def draw(run: list[Row], workloads: Iterable[Workload], path: Path) -> None:
    """Draw the workloads of one operation into a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure

    measured = by_workload(run)
    shown = [workload for workload in workloads if workload.name in measured]
    operation = shown[0].operation
    bars = [peer for peer in operation.shown if any(peer in measured[workload.name] for workload in shown)]
    figure = Figure(figsize=(10, 1.7 + 0.26 * len(bars) * len(shown)), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for position, workload in enumerate(shown):
        _draw_workload(ax, position, operation.unit, bars, measured[workload.name])
    _label_axes(ax, shown, operation, bars, run[0])
    figure.savefig(path)


def _draw_workload(ax: Axes, position: int, unit_peer: str, bars: list[str], peers: dict[str, Row]) -> None:
    unit, height = peers[unit_peer].median_ms, 0.78 / len(bars)
    for place, peer in enumerate(bars):
        row = peers.get(peer)
        if row is None or row.median_ms is None or unit is None:
            continue
        y = position + (place - (len(bars) - 1) / 2) * height
        low, multiple, high = row.p20_ms / unit, row.median_ms / unit, row.p80_ms / unit
        ax.barh(y, multiple - 1, left=1, height=height * 0.88, color=COLOURS[peer])
        ax.plot([low, high], [y, y], color=_INK, linewidth=0.9)
        label = f"{three_digits(multiple)}x   {three_digits(row.median_ms)} ms"
        ax.annotate(
            label,
            (max(high, 1), y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_INK,
            fontweight="bold" if peer == "ours" else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the grid
        )


def _label_axes(ax: Axes, shown: list[Workload], operation: Operation, bars: list[str], row: Row) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0.9), right * 2.2)  # room for the labels at the ends of the bars
    ax.set_ylim(len(shown) - 0.45, -0.55)
    ax.set_yticks(range(len(shown)), [workload.label.replace(", ", ",\n", 1) for workload in shown], color=_INK)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.axvline(1, color=_INK, linewidth=1)
    ax.grid(axis="x", color=_PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="both", which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(
        f"time as a multiple of {operation.titles[operation.unit]} (log scale, shorter is better; thin lines: p20 to "
        "p80)",
        color=_INK,
    )
    heading = operation.heading[0].upper() + operation.heading[1:]
    title = f"{heading} on {row.computes}, {row.isa}"
    columns = 3 if len(bars) <= 3 else 2
    rows_of_legend = -(-len(bars) // columns)
    ax.set_title(title, loc="left", fontweight="bold", color=_INK, pad=12 + 18 * rows_of_legend)
    ax.legend(
        handles=[Patch(color=COLOURS[peer], label=operation.titles[peer]) for peer in bars],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=columns,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.5,
        labelcolor=_INK,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The sweep over depths
# ---------------------------------------------------------------------------------------------------------------------


def draw_depths(run: list[Row], workloads: Iterable[DecoupledStepWorkload], path: Path) -> None:
    """Draw time against depth, at a constant number of layers times samples, into a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure

    measured = by_workload(run)
    shown = sorted((workload for workload in workloads if workload.name in measured), key=lambda w: w.depth)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for peer in DECOUPLED_STEP.shown:
        points = [(w.depth, medians(measured[w.name]).get(peer)) for w in shown]
        points = [(depth, time) for depth, time in points if time is not None]
        if points:
            width, title = (2.6 if peer == "ours" else 1.8), DECOUPLED_STEP.titles[peer]
            ax.plot(*zip(*points, strict=True), "o-", color=COLOURS[peer], linewidth=width, label=title)
    _label_depths(ax, shown, run[0])
    figure.savefig(path)


def _label_depths(ax: Axes, shown: list[DecoupledStepWorkload], row: Row) -> None:
    from matplotlib.ticker import NullLocator

    depths = [workload.depth for workload in shown]
    ax.set_xscale("log", base=2)
    ax.set_xticks(depths, [f"{depth}" for depth in depths])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"layers of {shown[0].width} units, with {shown[0].depth * shown[0].n_samples:,} / layers samples")
    ax.set_ylabel("milliseconds for one step")
    ax.set_title(f"As many products, deeper and deeper, on {row.computes}", loc="left", fontweight="bold")
    ax.grid(color=_PALE, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, labelcolor=_INK)


def update_plots(results: Path) -> None:
    """Draw the latest run of every device beside its results file. Raises ValueError if there are no results."""
    runs = read_latest_runs(results)
    if not runs:
        raise ValueError("no results yet: run `python -m bench` first")
    for run in runs:
        for operation, workloads in by_operation(run, WORKLOADS).items():
            (name, _), *of_sweep = pictures_of(operation, workloads, run[0].device)
            draw(run, [workload for workload in workloads if not is_sweep(workload)], results / name)
            for name, _ in of_sweep:
                draw_depths(run, [workload for workload in workloads if is_sweep(workload)], results / name)
