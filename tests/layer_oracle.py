"""What the layer-wise energies must be, straight from the equations, in extended precision and one layer at a time; and
the same energies in plain PyTorch, whose own error sets the tolerance. It knows nothing of lgd_kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from oracle import EXTENDED, Array, array
from tolerance import accumulation_dtype, assert_accurate
from torch import Tensor, nn

_erf = np.vectorize(math.erf, otypes=[EXTENDED])
_TWO_THIRDS, _C0, _C1 = EXTENDED(2) / 3, np.sqrt(EXTENDED(2) / math.pi), EXTENDED(44715) / 10**6
_LEAK = EXTENDED(1) / 100


def _logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _normal_cdf(x: Array) -> Array:
    return (1 + _erf(x / np.sqrt(EXTENDED(2)))) / 2


def _gelu_tanh_slope(x: Array) -> Array:
    y = np.tanh(_C0 * (x + _C1 * x**3))
    return (1 + y) / 2 + x * (1 - y**2) * _C0 * (1 + 3 * _C1 * x**2) / 2


# name: (f, f') in extended precision
EXACT: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "identity": (lambda x: x, np.ones_like),
    "relu": (lambda x: np.where(x > 0, x, 0), lambda x: (x > 0).astype(EXTENDED)),
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
    "scaled_tanh": (
        lambda x: EXTENDED("1.7159") * np.tanh(_TWO_THIRDS * x),
        lambda x: EXTENDED("1.7159") * _TWO_THIRDS / np.cosh(_TWO_THIRDS * x) ** 2,
    ),
    "sigmoid": (_logistic, lambda x: _logistic(x) * _logistic(-x)),
    "silu": (lambda x: x * _logistic(x), lambda x: _logistic(x) + x * _logistic(x) * _logistic(-x)),
    "gelu": (
        lambda x: x * _normal_cdf(x),
        lambda x: _normal_cdf(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * EXTENDED(math.pi)),
    ),
    "gelu_tanh": (lambda x: x * (1 + np.tanh(_C0 * (x + _C1 * x**3))) / 2, _gelu_tanh_slope),
    "leaky_relu": (lambda x: np.where(x > 0, x, _LEAK * x), lambda x: np.where(x > 0, EXTENDED(1), _LEAK)),
}
# the same in PyTorch
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": nn.functional.relu,
    "tanh": torch.tanh,
    "scaled_tanh": lambda x: 1.7159 * torch.tanh(x * 2 / 3),
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.01),
}
ACTIVATIONS = tuple(EXACT)
HIDDEN_LOSSES = ("squared", "huber")


def exact_residual(
    a: Array,
    target: Array,
    multiplier: Array | None,
    skip_input: Array | None,
    activation: str,
    hidden_loss: str,
    kappa: float,
    rho: float,
    skip: float,
    dual_step: float = 0.0,
) -> dict[str, Array]:
    """One layer: energy, e, delta, q, and the gradients of the energy."""
    f, slope = EXACT[activation]
    e = target - f(a) - (skip * skip_input if skip else 0)
    if hidden_loss == "squared":
        loss, pull = e**2 / 2, e
    else:
        inside = np.abs(e) <= kappa
        loss = np.where(inside, e**2 / 2, kappa * (np.abs(e) - EXTENDED(kappa) / 2))
        pull = np.where(inside, e, kappa * np.sign(e))
    weight = (0 if multiplier is None else multiplier) + dual_step * e
    q = rho * pull + weight
    delta = -q * slope(a)
    return {
        "energy": (rho * loss + weight * e).sum(),
        "e": e,
        "delta": delta,
        "q": q,
        "logits": delta,
        "target": q,
        "multiplier": e,
        "skip_input": -skip * q,
    }


def exact_linear(
    z: Array,
    weight: Array,
    bias: Array | None,
    target: Array,
    multiplier: Array | None,
    activation: str,
    preactivation: bool,
    hidden_loss: str,
    kappa: float,
    rho: float,
    skip: float,
    branch_scale: float,
    dual_step: float = 0.0,
) -> dict[str, Array]:
    """One layer: energy, e, delta, q, and the gradients of the energy."""
    phi, f = (activation, "identity") if preactivation else ("identity", activation)
    x = EXACT[phi][0](z)
    a = branch_scale * np.einsum("ni,oi->no", x, weight) + (0 if bias is None else bias)
    layer = exact_residual(a, target, multiplier, z, f, hidden_loss, kappa, rho, skip, dual_step)
    branch = branch_scale * np.einsum("no,oi->ni", layer["delta"], weight) * EXACT[phi][1](z)
    return layer | {
        "z": branch - (skip * layer["q"] if skip else 0),
        "weight": branch_scale * np.einsum("no,ni->oi", layer["delta"], x),
        "bias": layer["delta"].sum(0),
    }


def exact_layers(function: Callable, tensors: Sequence[Tensor | None], per_layer: Sequence[dict]) -> dict[str, Array]:
    """`function`'s results for a stack of layers, stacked."""
    arrays = [None if x is None else array(x) for x in tensors]
    layers = [
        function(*(None if x is None else x[t] for x in arrays), **options) for t, options in enumerate(per_layer)
    ]
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def plain_residual(
    a: Tensor,
    target: Tensor,
    multiplier: Tensor | None,
    skip_input: Tensor | None,
    activation: str,
    hidden_loss: str,
    kappa: float,
    rho: float,
    skip: float,
) -> Tensor:
    """The energy of one layer in plain PyTorch, summed in the accumulation dtype."""
    prediction = PLAIN[activation](a) + (skip * skip_input if skip else 0)
    if hidden_loss == "squared":
        loss = nn.functional.mse_loss(prediction, target, reduction="none") / 2
    else:
        loss = nn.functional.huber_loss(prediction, target, reduction="none", delta=kappa)
    energy = rho * loss if multiplier is None else rho * loss + multiplier * (target - prediction)
    return energy.to(accumulation_dtype(a.dtype)).sum()


def plain_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    multiplier: Tensor | None,
    activation: str,
    preactivation: bool,
    hidden_loss: str,
    kappa: float,
    rho: float,
    skip: float,
    branch_scale: float,
) -> Tensor:
    """The energy of one layer in plain PyTorch, summed in the accumulation dtype."""
    phi, f = (activation, "identity") if preactivation else ("identity", activation)
    a = branch_scale * nn.functional.linear(PLAIN[phi](z), weight)
    a = a if bias is None else a + bias
    return plain_residual(a, target, multiplier, z, f, hidden_loss, kappa, rho, skip)


def plain_layers(function: Callable, tensors: Sequence[Tensor | None], per_layer: Sequence[dict]) -> Tensor:
    """`function`'s energies for a stack of layers."""
    energies = [
        function(*(None if x is None else x[t] for x in tensors), **options) for t, options in enumerate(per_layer)
    ]
    return torch.stack(energies)


def assert_layers(got: Tensor, expected: Array, plain: Tensor, dtype: torch.dtype, what: str) -> None:
    """`got` is `expected` within the tolerance of tolerance.py, relative to the largest element."""
    scale = np.abs(expected).max(initial=0)
    assert_accurate(got, expected, array(plain), scale, accumulation_dtype(dtype), what)
