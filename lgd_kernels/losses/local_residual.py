"""The local residual of stacked layers from their raw logits, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.autograd.local_residual import LocalResidualOptions, local_residual
from lgd_kernels.losses.checks import (
    activation_codes,
    check_alike,
    check_shape,
    check_tensor,
    hidden_loss_code,
    in_float32,
    is_needed,
    layer_numbers,
    weights_of_energy,
)


def local_residual_loss(
    logits: Tensor,
    target: Tensor,
    *,
    activation: str | Sequence[str] = "tanh",
    hidden_loss: str = "squared",
    kappa: float = 1.0,
    rho: float | Sequence[float] = 1.0,
    multiplier: Tensor | None = None,
    skip: float | Sequence[float] = 0.0,
    skip_input: Tensor | None = None,
) -> Tensor:
    """Energy of the hidden error of every layer, from raw logits: how far each layer is from its stored target.

    For layer t with raw logits a_t, activation f, skip coefficient c and multiplier lambda:

        e_t      = target_t - (c * skip_input_t + f(a_t))
        energy_t = sum over samples and units of  rho * L(e_t) + lambda_t * e_t
        L(e)     = e^2 / 2  for "squared";  e^2 / 2 up to |e| = kappa, then kappa (|e| - kappa / 2)  for "huber"

    This is one layer's share of the augmented Lagrangian of a net whose hidden values are variables of their own
    (method of auxiliary coordinates, Carreira-Perpinan & Wang 2014, arXiv:1212.5921; with multipliers Taylor et al.
    2016, arXiv:1605.02026). Its gradient is the layer's backpropagation signal: with q = rho L'(e) + lambda,
    denergy/dtarget = q and denergy/dlogits = -q f'(a). Differentiable, twice and more, in all four tensors. Inputs are
    never modified.

    Args:
        logits: (T, n, d), T layers of n samples and d units, or (n, d) for one; float64, float32, bfloat16 or float16;
            any strides. Sums are accumulated in float64 for float64 and in float32 otherwise.
        target: the shape of logits.
        activation: "identity" | "relu" | "tanh" | "scaled_tanh" (1.7159 tanh(2 a / 3)) | "sigmoid" | "silu" | "gelu" |
            "gelu_tanh" | "leaky_relu" (slope 0.01), or a list with one name per layer.
        hidden_loss: "squared" | "huber".
        kappa: where huber becomes linear; positive, in the units of target.
        rho: weight of the hidden loss, not negative; one number, or one per layer.
        multiplier: lambda, the shape of logits.
        skip: c; one number, or one per layer. Needs skip_input unless it is 0.
        skip_input: the shape of logits.

    Returns:
        The energies (T,), or () for one layer without the first dimension, in float64 for float64 and in float32
        otherwise. Sums, not means. Under autocast all tensors are taken in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device, value or name.
    """
    check_tensor("logits", logits, (2, 3))
    tensors = {"logits": logits, "target": target, "multiplier": multiplier, "skip_input": skip_input}
    for name, tensor in tensors.items():
        if tensor is not None or name == "target":
            check_tensor(name, tensor, (2, 3))
            check_shape(name, tensor, logits.shape, "as logits have it")
    autocast = torch.is_autocast_enabled(logits.device.type)
    check_alike(tensors, autocast)
    n_layers = 1 if logits.dim() == 2 else logits.shape[0]
    codes, numbers = activation_codes(activation, n_layers), layer_numbers("skip", skip, n_layers)
    loss, rhos = hidden_loss_code(hidden_loss, kappa), weights_of_energy(rho, n_layers)
    if skip_input is None and any(numbers):
        raise ValueError(f"skip_input: is None, but skip is {skip}")

    if autocast:
        tensors = {name: in_float32(tensor) for name, tensor in tensors.items()}
    rows = [tensor if tensor is None or tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in tensors.values()]
    needs = (is_needed([rows[2]]), is_needed(rows))
    options = LocalResidualOptions(codes, loss, float(kappa), rhos, numbers)
    energies, _, _, _ = local_residual(*rows, options, *needs)
    return energies.squeeze(0) if logits.dim() == 2 else energies
