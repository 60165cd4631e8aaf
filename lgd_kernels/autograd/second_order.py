"""What the second derivatives of the per-layer energies have in common.

With E_t(x) the energies and g their upstream gradients, the first backward computes G(x, g) = sum_t g_t dE_t/dx. The
Jacobian of G in x is symmetric, so that one pull-back serves its backward and its forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradient_of_tangent(
    tangent: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    directions: Sequence[Tensor | None],
    grad_energy: Tensor,
) -> tuple[list[Tensor | None], Tensor]:
    """(gradients of sum_t grad_energy_t * tangent_t with respect to the inputs, tangent (T,)).

    tangent: differentiable, from all inputs and all directions to the change (T,) of the energies. An input that is
    None has the gradient None.
    """
    given = [i for i, x in enumerate(inputs) if x is not None]

    def of_given(*xs: Tensor) -> Tensor:
        every = list(inputs)
        for i, x in zip(given, xs, strict=True):
            every[i] = x
        return tangent(*every, *directions)

    change, pull_back = torch.func.vjp(of_given, *(inputs[i] for i in given))
    gradients: list[Tensor | None] = [None] * len(inputs)
    for i, gradient in zip(given, pull_back(grad_energy.to(change.dtype)), strict=True):
        gradients[i] = gradient
    return gradients, change


def tangent_of_gradients(
    by_inputs: Sequence[Tensor | None],
    by_upstream: Sequence[Tensor] | None,
    needed: Sequence[bool],
    without: Tensor,
) -> tuple[Tensor, ...]:
    """The change of G: what the inputs contribute (the Hessian applied to their change) and what grad_energy does.
    `without` stands for the change of a gradient that is not needed."""
    if by_upstream is None:
        by_upstream = [0] * len(needed)
    parts = zip(by_inputs, by_upstream, needed, strict=True)
    return tuple(from_inputs + from_upstream if need else without for from_inputs, from_upstream, need in parts)


def scaled_by_layer(grad_energy: Tensor, factor: Tensor, dtype: torch.dtype, needed: bool = True) -> Tensor:
    """grad_energy (T,) times factor (T, n, d), rounded to `dtype` once; without elements if it is not needed."""
    if not needed:
        return factor.new_empty(0, dtype=dtype)
    return (grad_energy[:, None, None] * factor.to(grad_energy.dtype)).to(dtype)


def times_option(grad_energy: Tensor, option: Sequence[float]) -> Tensor:
    """grad_energy (T,) times one number per layer, without a copy from host memory."""
    if len(set(option)) <= 1:
        return grad_energy * (option[0] if option else 1.0)
    return torch.stack([value * g for value, g in zip(option, grad_energy.unbind(0), strict=True)])
