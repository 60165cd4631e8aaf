"""The picture: the time of every peer as a multiple of a copy of the logits, for every workload."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bench.peers import TITLES
from bench.results import Row, by_workload, read_latest_runs
from bench.table import three_digits
from bench.workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# top to bottom in every group; of the palette of Okabe and Ito, which is safe for the colour-blind
COLOURS = {"eager": "#B8BCC2", "compiled": "#56B4E9", "ours": "#D55E00"}
_INK, _PALE = "#24292F", "#D0D4D9"
_BAR = 0.26  # of the distance between two workloads


def draw(run: list[Row], workloads: Iterable[Workload], path: Path) -> None:
    """Draw one run into a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure

    measured = by_workload(run)
    shown = [workload for workload in workloads if workload.name in measured]
    figure = Figure(figsize=(10, 1.7 + 0.78 * len(shown)), dpi=150, layout="constrained")
    ax = figure.add_subplot()
    for position, workload in enumerate(shown):
        _draw_workload(ax, position, measured[workload.name])
    _label_axes(ax, shown, run[0])
    figure.savefig(path)


def _draw_workload(ax: Axes, position: int, peers: dict[str, Row]) -> None:
    copy = peers["copy"].median_ms
    for place, (peer, colour) in enumerate(COLOURS.items()):
        row = peers.get(peer)
        if row is None or row.median_ms is None:
            continue
        y = position + (place - 1) * _BAR
        low, multiple, high = row.p20_ms / copy, row.median_ms / copy, row.p80_ms / copy
        ax.barh(y, multiple - 1, left=1, height=_BAR * 0.88, color=colour)
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


def _label_axes(ax: Axes, shown: list[Workload], row: Row) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set_xscale("log")
    left, right = ax.get_xlim()
    ax.set_xlim(min(left, 0.9), right * 2.2)  # room for the labels at the ends of the bars
    ax.set_ylim(len(shown) - 0.45, -0.55)
    ax.set_yticks(range(len(shown)), [workload.label.replace(" H, ", " H\n", 1) for workload in shown], color=_INK)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    ax.axvline(1, color=_INK, linewidth=1)
    ax.grid(axis="x", color=_PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="both", which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel(
        "time as a multiple of one copy of the logits (log scale, shorter is better; thin lines: p20 to p80)",
        color=_INK,
    )
    ax.set_title(
        f"Loss + gradient on {row.cpu}, {row.threads} threads, {row.isa}",
        loc="left",
        fontweight="bold",
        color=_INK,
        pad=30,
    )
    handles = [Patch(color=colour, label=TITLES[peer]) for peer, colour in COLOURS.items()]
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(handles),
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.5,
        labelcolor=_INK,
    )


def update_plots(results: Path) -> None:
    """Draw the latest run of every device beside its results file. Raises ValueError if there are no results."""
    runs = read_latest_runs(results)
    if not runs:
        raise ValueError("no results yet: run `python -m bench` first")
    for run in runs:
        draw(run, WORKLOADS, results / f"{run[0].device}.png")
