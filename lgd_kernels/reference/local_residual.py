"""local_residual in plain PyTorch.

Shapes: T layers of n samples and d units, stacked: logits, target, multiplier and skip_input are (T, n, d). Lists have
one entry per layer. Work is done in the accumulation type: float64 for float64 tensors, float32 otherwise. A layer's
results do not depend on the others, bit for bit: every layer is computed by itself, and its energy is summed row by
row first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.reference.activations import activate, hidden_loss, hidden_loss_derivative, times_derivative
from lgd_kernels.reference.softmax_infogain import accumulation_dtype


def stacked(
    layers: Sequence[Tensor], shape: Sequence[int], like: Tensor, dtype: torch.dtype, wanted: bool = True
) -> Tensor:
    """The layers' tensors of one `shape` as one new contiguous tensor of `dtype` with the layers first; an empty one
    if it is not wanted."""
    if not wanted:
        return like.new_empty(0, dtype=dtype)
    if len(layers) == 0:
        return like.new_empty((0, *shape), dtype=dtype)
    return torch.stack([layer.to(dtype) for layer in layers])


def layers_of(tensor: Tensor | None, n_layers: int, dtype: torch.dtype) -> Sequence[Tensor | None]:
    """The layers of an optional stack, in `dtype`."""
    if tensor is None:
        return [None] * n_layers
    return [layer.to(dtype) for layer in tensor.unbind(0)]


def layer_residual(logits: Tensor, target: Tensor, skip_input: Tensor | None, activation: int, skip: float) -> Tensor:
    """e = target - (skip * skip_input + f(logits)) of one layer, (n, d)."""
    prediction = activate(activation, logits)
    if skip != 0:
        prediction = skip * skip_input + prediction
    return target - prediction


def layer_energy(
    e: Tensor, multiplier: Tensor | None, code: int, kappa: float, rho: float, dual_step: float
) -> tuple[Tensor, Tensor]:
    """(energy (), q (n, d)) of one layer with residual e (n, d), where q = dE/de."""
    q = rho * hidden_loss_derivative(code, e, kappa)
    energy = rho * hidden_loss(code, e, kappa)
    if dual_step != 0:
        multiplier = dual_step * e if multiplier is None else multiplier + dual_step * e
    if multiplier is not None:
        q = q + multiplier
        energy = energy + multiplier * e
    return energy.sum(1).sum(0), q


def local_residual(
    logits: Tensor,
    target: Tensor,
    multiplier: Tensor | None,
    skip_input: Tensor | None,
    activation: list[int],
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    dual_step: list[float],
    need_residual: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (T,) of every layer; on request its residual e; on request delta and q, each (T, n, d).

        e      = target - (skip * skip_input + f(logits))
        lambda = multiplier + dual_step * e                  the multiplier after its update, which the caller stores
        energy = sum of rho * L(e) + lambda * e over samples and units
        q      = rho * L'(e) + lambda                        = dE/dtarget at constant lambda
        delta  = -q * f'(logits)                             = dE/dlogits

    Energies have the accumulation type, the other outputs the logits' dtype; what is not asked for has no elements.
    """
    accumulate = accumulation_dtype(logits.dtype)
    tensors = (layers_of(x, logits.shape[0], accumulate) for x in (logits, target, multiplier, skip_input))
    energies, residuals, deltas, qs = [], [], [], []
    for t, (a, y, lambda_, x) in enumerate(zip(*tensors, strict=True)):
        e = layer_residual(a, y, x, activation[t], skip[t])
        energy, q = layer_energy(e, lambda_, hidden_loss, kappa, rho[t], dual_step[t])
        energies.append(energy)
        residuals.append(e)
        if need_gradient:
            deltas.append(times_derivative(activation[t], a, -q))
            qs.append(q)
    shape = logits.shape[1:]
    return (
        stacked(energies, (), logits, accumulate),
        stacked(residuals, shape, logits, logits.dtype, need_residual),
        stacked(deltas, shape, logits, logits.dtype, need_gradient),
        stacked(qs, shape, logits, logits.dtype, need_gradient),
    )


def local_residual_tangent(
    logits: Tensor,
    target: Tensor,
    multiplier: Tensor | None,
    skip_input: Tensor | None,
    logits_t: Tensor | None,
    target_t: Tensor | None,
    multiplier_t: Tensor | None,
    skip_input_t: Tensor | None,
    activation: list[int],
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
) -> Tensor:
    """The change (T,) of the energies when the inputs change by the tangents (names in _t; None is no change).

        e_t      = target_t - skip * skip_input_t - f'(logits) * logits_t
        energy_t = sum of q * e_t + multiplier_t * e

    Differentiable in everything, which gives the second derivatives of the energies.
    """
    accumulate = accumulation_dtype(logits.dtype)
    stacks = (logits, target, multiplier, skip_input, logits_t, target_t, multiplier_t, skip_input_t)
    tensors = (layers_of(x, logits.shape[0], accumulate) for x in stacks)
    tangents = []
    for t, (a, y, lambda_, x, a_t, y_t, lambda_t, x_t) in enumerate(zip(*tensors, strict=True)):
        e = layer_residual(a, y, x, activation[t], skip[t])
        _, q = layer_energy(e, lambda_, hidden_loss, kappa, rho[t], 0.0)
        e_t = torch.zeros_like(e)
        if y_t is not None:
            e_t = e_t + y_t
        if x_t is not None and skip[t] != 0:
            e_t = e_t - skip[t] * x_t
        if a_t is not None:
            e_t = e_t - times_derivative(activation[t], a, a_t)
        tangent = q * e_t if lambda_t is None else q * e_t + lambda_t * e
        tangents.append(tangent.sum(1).sum(0))
    return stacked(tangents, (), logits, accumulate)
