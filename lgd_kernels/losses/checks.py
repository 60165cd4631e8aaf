"""Checks of arguments that the layer-wise losses share. Each raises with the argument's name and both values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lgd_kernels.arguments import FLOATING, one_of
from lgd_kernels.reference import ACTIVATIONS, HIDDEN_LOSSES


def check_tensor(name: str, tensor: Tensor, dims: Sequence[int]) -> None:
    """tensor is a floating-point tensor with one of these numbers of dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: dtype must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise ValueError(f"{name}: expected {wanted} dimensions, got {tensor.dim()} (shape {tuple(tensor.shape)})")


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], because: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} {because}, got {tuple(tensor.shape)}")


def check_alike(tensors: dict[str, Tensor | None], autocast: bool) -> None:
    """All tensors are on the device of the first and have its dtype; under autocast only float64 has to agree."""
    (first_name, first), *others = [(name, x) for name, x in tensors.items() if x is not None]
    for name, x in others:
        if x.device != first.device:
            raise ValueError(f"{name}: is on {x.device}, but {first_name} is on {first.device}")
        mixed = x.dtype != first.dtype
        if mixed and (not autocast or torch.float64 in (x.dtype, first.dtype)):
            raise TypeError(f"{name}: has dtype {x.dtype}, but {first_name} has dtype {first.dtype}")


def _for_every_layer(name: str, value, n_layers: int, layers: str = "layers") -> list:
    """One value for all layers, or a list with one per layer, as a list. layers: what messages call them."""
    if not isinstance(value, (list, tuple)):
        return [value] * n_layers
    if len(value) != n_layers:
        raise ValueError(f"{name}: has {len(value)} values, but there are {n_layers} {layers}")
    return list(value)


def activation_codes(activation: str | Sequence[str], n_layers: int) -> list[int]:
    """Names of activations as the codes of the ops."""
    return [one_of("activation", name, ACTIVATIONS) for name in _for_every_layer("activation", activation, n_layers)]


def hidden_loss_code(hidden_loss: str, kappa: float) -> int:
    """The name of a hidden loss as the code of the ops."""
    if isinstance(kappa, bool) or not isinstance(kappa, (int, float)):
        raise TypeError(f"kappa: expected a number, got {type(kappa).__name__}")
    if not kappa > 0:
        raise ValueError(f"kappa: must be positive, got {kappa}")
    return one_of("hidden_loss", hidden_loss, HIDDEN_LOSSES)


def layer_numbers(name: str, value: float | Sequence[float], n_layers: int, layers: str = "layers") -> list[float]:
    """A finite number for every layer."""
    numbers = _for_every_layer(name, value, n_layers, layers)
    for number in numbers:
        if not isinstance(number, (int, float)):
            raise TypeError(f"{name}: expected a number, or a list with one per layer, got {type(number).__name__}")
        if not math.isfinite(number):
            raise ValueError(f"{name}: must be finite, got {number}")
    return [float(number) for number in numbers]


def weights_of_energy(rho: float | Sequence[float], n_layers: int, layers: str = "layers") -> list[float]:
    """rho of every layer: finite and not negative."""
    numbers = layer_numbers("rho", rho, n_layers, layers)
    for number in numbers:
        if number < 0:
            raise ValueError(f"rho: must not be negative, got {number}")
    return numbers


def is_needed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody may ask for the gradient of one of the tensors. Inside a transform of torch.func nobody can
    know, so that the answer is yes."""
    given = [x for x in tensors if x is not None]
    if torch._C._are_functorch_transforms_active():
        return len(given) > 0
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


def in_float32(tensor: Tensor | None) -> Tensor | None:
    """The tensor as autocast hands it to what must run in full precision; float64 stays as it is."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()
