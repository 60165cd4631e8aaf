"""A picture of the diagnostics of one or several states of a net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lgd_kernels.diagnostics.measure import Diagnostics, SampleGradientNorms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")  # Okabe & Ito


def plot_diagnostics(diagnostics: Diagnostics | Mapping[str, Diagnostics]) -> Figure:
    """Six panels over the layers: energies, residuals, gaps to the feed-forward values, cosines and ratios of norms
    with backpropagation's gradients, and the norms of the gradients of single samples.

    Args:
        diagnostics: what `diagnose` returns; or several of them by name, such as those of some epochs, or of nets
            trained in different ways. Their nets may have different numbers of layers.

    Returns:
        A matplotlib figure, which belongs to no window; `figure.savefig(path)` writes it. Needs matplotlib.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    states = {"": diagnostics} if isinstance(diagnostics, Diagnostics) else dict(diagnostics)
    spread = colormaps["viridis"].resampled(max(len(states), 2))
    colors = _COLORS if len(states) <= len(_COLORS) else [spread(i) for i in range(len(states))]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = list(figure.subplots(2, 3, sharex=True).flat)
    for (name, state), color in zip(states.items(), colors, strict=False):
        _draw(axes, state, {"color": color, "label": name})
    _describe(axes)
    if any(states):
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    return figure


def _draw(axes: list[Axes], state: Diagnostics, style: dict) -> None:
    hidden = (state.residual, state.gap)
    of_layers = (state.energy, state.gradient.cosine, state.gradient.norm_ratio)
    energy, residual, gap, cosine, norm_ratio, sample_norms = axes
    for ax, values in zip((energy, cosine, norm_ratio), of_layers, strict=True):
        ax.plot(range(len(values)), values.numpy(force=True), marker=".", linewidth=1.5, **style)
    for ax, values in zip((residual, gap), hidden, strict=True):
        ax.plot(range(1, len(values) + 1), 100 * values.numpy(force=True), marker=".", linewidth=1.5, **style)
    low, median, high = _quantiles(state.sample_gradient_norms)
    layers = range(len(median))
    sample_norms.plot(layers, median.numpy(force=True), marker=".", linewidth=1.5, **style)
    sample_norms.fill_between(layers, low.numpy(force=True), high.numpy(force=True), color=style["color"], alpha=0.2)


def _quantiles(norms: SampleGradientNorms) -> Tensor:
    """(3, T): the tenth, fiftieth and ninetieth percentile over the samples, of weight and bias together."""
    together = (norms.weight.square() + norms.bias.square()).sqrt()
    return together.quantile(torch.tensor([0.1, 0.5, 0.9]).to(together), dim=1)


def _describe(axes: list[Axes]) -> None:
    titles = {
        "Energy": "mean over samples",
        "Residual": "norm of e / norm of z (%)",
        "Gap to feed-forward values": "relative to their norm (%)",
        "Gradient: cosine with backpropagation's": "cosine",
        "Gradient: norm over backpropagation's": "ratio",
        "Gradient norms of samples": "median, 10 to 90 %",
    }
    for ax, (title, y_label) in zip(axes, titles.items(), strict=True):
        of_values = title in ("Residual", "Gap to feed-forward values")
        ax.set(title=title, ylabel=y_label, xlabel="hidden value" if of_values else "layer (0 is next to the input)")
        ax.tick_params(labelbottom=True)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    energy, _, _, cosine, norm_ratio, sample_norms = axes
    cosine.axhline(1, color="#888888", linewidth=0.8)
    norm_ratio.axhline(1, color="#888888", linewidth=0.8)
    norm_ratio.set_yscale("log")
    sample_norms.set_yscale("log")
    energy.set_yscale("symlog", linthresh=1e-4)
