"""Measurements of a DecoupledNetwork at given hidden values. They change nothing: neither z nor parameters, `.grad` or
buffers. Arguments are those of `DecoupledNetwork`; layers are counted from 0, and hidden value z_t is what layer t - 1
makes. A net with Dropout should be in eval mode, or its passes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lgd_kernels.decoupled import DecoupledNetwork
from lgd_kernels.decoupled.energy import Evaluation, Gradient
from lgd_kernels.decoupled.layers import call
from lgd_kernels.reference import accumulation_dtype
from lgd_kernels.reference.activations import ACTIVATIONS, activate
from lgd_kernels.reference.decoupled_linear import functions_of

Rho = float | Sequence[float]


class Comparison(NamedTuple):
    """Of every layer's gradient, all its parameters as one vector, with backpropagation's. NaN for a layer without
    parameters, and where a gradient is 0."""

    cosine: Tensor  # (T,)
    norm_ratio: Tensor  # (T,): local / backpropagation


class SampleGradientNorms(NamedTuple):
    """The Euclidean norm of every sample's part in the gradient (before the mean) of a layer. NaN for layers that the
    fused ops do not know: theirs would need a gradient for each sample. 0 for a bias that is not there."""

    weight: Tensor  # (T, n)
    bias: Tensor  # (T, n)


class Diagnostics(NamedTuple):
    """A net's state for some samples."""

    energy: Tensor  # (T,): of every layer, mean over the samples; the last one is the loss
    residual: Tensor  # (T-1,): norm of z_t - zhat_t over that of z_t
    gap: Tensor  # (T-1,): norm of z_t - (the value of the net fed forward) over that of the latter
    gradient: Comparison
    sample_gradient_norms: SampleGradientNorms


def diagnose(
    net: DecoupledNetwork,
    x: Tensor,
    z: list[Tensor],
    target: Tensor,
    *,
    multiplier: list[Tensor] | None = None,
    rho: Rho = 1.0,
) -> Diagnostics:
    """Everything that this module measures."""
    evaluation = net.evaluation(x, z, target, multiplier=multiplier, rho=rho)
    return Diagnostics(
        energy=evaluation.energies / max(len(x), 1),
        residual=_relative_norms(evaluation.residuals, z),
        gap=feed_forward_gap(net, x, z),
        gradient=_comparison(net, evaluation.gradients_of_parameters(), _backpropagation(net, x, target)),
        sample_gradient_norms=_sample_gradient_norms(evaluation),
    )


def feed_forward_gap(net: DecoupledNetwork, x: Tensor, z: list[Tensor]) -> Tensor:
    """(T-1,): how far z_t is from the value of the net fed forward, relative to the norm of the latter."""
    values = net.hidden_values(x)
    return _relative_norms([mine - fed for mine, fed in zip(z, values, strict=True)], values)


def compare_with_backpropagation(
    net: DecoupledNetwork,
    x: Tensor,
    z: list[Tensor],
    target: Tensor,
    *,
    multiplier: list[Tensor] | None = None,
    rho: Rho = 1.0,
) -> Comparison:
    """Cosine and ratio of norms between every layer's gradient, at this z and multiplier, and that of the ordinary
    net's loss."""
    evaluation = net.evaluation(x, z, target, multiplier=multiplier, rho=rho)
    return _comparison(net, evaluation.gradients_of_parameters(), _backpropagation(net, x, target))


def sample_gradient_norms(
    net: DecoupledNetwork,
    x: Tensor,
    z: list[Tensor],
    target: Tensor,
    *,
    multiplier: list[Tensor] | None = None,
    rho: Rho = 1.0,
) -> SampleGradientNorms:
    """Norms of the gradients of single samples, without these gradients: that of a linear layer's weight is the outer
    product of delta_i and s phi(z_i), so that its norm is |s| |delta_i| |phi(z_i)| (Goodfellow 2015, arXiv:1510.01799),
    and that of its bias is delta_i."""
    return _sample_gradient_norms(net.evaluation(x, z, target, multiplier=multiplier, rho=rho))


# ---------------------------------------------------------------------------------------------------------------------
# How
# ---------------------------------------------------------------------------------------------------------------------


def _relative_norms(of: list[Tensor], relative_to: list[Tensor]) -> Tensor:
    """(T-1,): Euclidean norms over samples and units, as ratios."""
    ratios = [
        torch.linalg.vector_norm(a, dtype=dtype) / torch.linalg.vector_norm(b, dtype=dtype)
        for a, b in zip(of, relative_to, strict=True)
        for dtype in [accumulation_dtype(a.dtype)]
    ]
    return torch.stack(ratios) if ratios else torch.empty(0)


def _backpropagation(net: DecoupledNetwork, x: Tensor, target: Tensor) -> list[Gradient]:
    """Gradients of the ordinary net's loss, summed over the samples."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = net.head_loss(call([net], x, keep_buffers=True), target)
        values = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [Gradient(p, value) for p, value in zip(parameters, values, strict=True) if value is not None]


def _comparison(net: DecoupledNetwork, local: list[Gradient], backpropagated: list[Gradient]) -> Comparison:
    mine, others = _by_parameter(local), _by_parameter(backpropagated)
    cosines, ratios = [], []
    for layer in net.layers:
        a, b = _as_vector(layer, mine), _as_vector(layer, others)
        cosines.append(a @ b / (a.norm() * b.norm()))
        ratios.append(a.norm() / b.norm())
    return Comparison(torch.stack(cosines), torch.stack(ratios))


def _by_parameter(gradients: list[Gradient]) -> dict[nn.Parameter, Tensor]:
    """The gradients by their parameters, added where several layers share one."""
    sums: dict[nn.Parameter, Tensor] = {}
    for parameter, value in gradients:
        value = value.to(parameter.dtype)
        sums[parameter] = sums[parameter] + value if parameter in sums else value
    return sums


def _as_vector(layer: nn.Module, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """The gradients in all parameters of a layer; 0 for those that have none."""
    vectors = [gradients.get(p, torch.zeros_like(p)).flatten() for p in layer.parameters() if p.requires_grad]
    return torch.cat(vectors) if vectors else next(iter(gradients.values())).new_zeros(0)


def _sample_gradient_norms(evaluation: Evaluation) -> SampleGradientNorms:
    of_weights, of_biases = [], []
    for layer, z, delta in zip(evaluation.net.linear, evaluation.point.inputs, evaluation.deltas, strict=True):
        if layer is None or z.dim() != 2:
            of_weight = of_bias = delta.new_full((len(delta),), torch.nan)
        else:
            phi, _ = functions_of(ACTIVATIONS.index(layer.activation), layer.preactivation)
            of_delta = delta.norm(dim=1)
            of_weight = abs(layer.branch_scale) * of_delta * activate(phi, z.to(delta.dtype)).norm(dim=1)
            of_bias = torch.zeros_like(of_delta) if layer.bias is None else of_delta
        of_weights.append(of_weight)
        of_biases.append(of_bias)
    return SampleGradientNorms(torch.stack(of_weights), torch.stack(of_biases))
