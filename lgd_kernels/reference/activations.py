"""Activations, hidden losses and their derivatives, by the codes that the ops take.

A code is a position in ACTIVATIONS or HIDDEN_LOSSES. Every function here is elementwise, keeps shape and dtype, lets
NaN through, and is differentiable as often as its formula is: the derivatives are formulas of their own, so that their
derivatives are right too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LEAKY_SLOPE = 0.01
_TANH_SCALE, _TANH_STRETCH = 1.7159, 2 / 3  # LeCun et al., "Efficient BackProp", 1998
_GELU_STRETCH, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715  # Hendrycks & Gimpel, arXiv:1606.08415


def _step(x: Tensor) -> Tensor:
    """1 for x > 0, 0 for x <= 0, NaN for NaN."""
    return torch.ceil(x.clamp(0, 1))


def _one_minus_square(y: Tensor) -> Tensor:
    return (1 - y) * (1 + y)  # at most one rounding near |y| = 1, where 1 - y * y cancels


def _sigmoid_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _silu_derivative(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    y = torch.tanh(_GELU_STRETCH * (x + _GELU_CUBIC * x * x * x))
    slope = _GELU_STRETCH * (1 + 3 * _GELU_CUBIC * x * x)
    return 0.5 * (1 + y) + 0.5 * x * _one_minus_square(y) * slope


# name: (function, derivative)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda x: x, torch.ones_like),
    "relu": (torch.relu, _step),
    "tanh": (torch.tanh, lambda x: _one_minus_square(torch.tanh(x))),
    "scaled_tanh": (
        lambda x: _TANH_SCALE * torch.tanh(_TANH_STRETCH * x),
        lambda x: _TANH_SCALE * _TANH_STRETCH * _one_minus_square(torch.tanh(_TANH_STRETCH * x)),
    ),
    "sigmoid": (torch.sigmoid, _sigmoid_derivative),
    "silu": (torch.nn.functional.silu, _silu_derivative),
    "gelu": (torch.nn.functional.gelu, _gelu_derivative),
    "gelu_tanh": (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), _gelu_tanh_derivative),
    "leaky_relu": (
        lambda x: torch.nn.functional.leaky_relu(x, LEAKY_SLOPE),
        lambda x: LEAKY_SLOPE + (1 - LEAKY_SLOPE) * _step(x),
    ),
}
ACTIVATIONS = tuple(_ACTIVATIONS)
HIDDEN_LOSSES = ("squared", "huber")
IDENTITY, SQUARED = ACTIVATIONS.index("identity"), HIDDEN_LOSSES.index("squared")
_BY_CODE = tuple(_ACTIVATIONS.values())


def activate(code: int, x: Tensor) -> Tensor:
    """f(x)."""
    return _BY_CODE[code][0](x)


def activation_derivative(code: int, x: Tensor) -> Tensor:
    """f'(x); at the kink of relu and leaky_relu the value from below."""
    return _BY_CODE[code][1](x)


def times_derivative(code: int, x: Tensor, factor: Tensor) -> Tensor:
    """factor * f'(x)."""
    return factor if code == IDENTITY else factor * activation_derivative(code, x)


def hidden_loss_derivative(code: int, e: Tensor, kappa: float) -> Tensor:
    """L'(e): e for squared, e clipped to +-kappa for huber."""
    return e if code == SQUARED else e.clamp(-kappa, kappa)


def hidden_loss(code: int, e: Tensor, kappa: float) -> Tensor:
    """L(e): e^2 / 2 for squared; for huber the same up to |e| = kappa and kappa (|e| - kappa / 2) beyond."""
    if code == SQUARED:
        return 0.5 * e * e
    slope = hidden_loss_derivative(code, e, kappa)
    return slope * (e - 0.5 * slope)
