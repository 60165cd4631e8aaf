"""The local energies of the linear layers of a decoupled net, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lgd_kernels.autograd.decoupled_linear import DecoupledLinearOptions, decoupled_linear
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
from lgd_kernels.reference.decoupled_linear import n_layers_of


def _check_tensors(tensors: dict[str, Tensor | None], layer: str, dim: int, autocast: bool) -> None:
    """The tensors of a stack of layers (dim 3), or of one layer of a list (dim 2, and layer is "[t]"), fit."""
    z, weight, bias, target, multiplier = tensors.values()
    check_tensor("z" + layer, z, (dim,))
    check_tensor("weight" + layer, weight, (dim,))
    check_tensor("target" + layer, target, (dim,))
    fits = f"for z{layer} of shape {tuple(z.shape)}"
    check_shape("weight" + layer, weight, (*z.shape[:-2], weight.shape[-2], z.shape[-1]), fits)
    fits = f"{fits} and weight{layer} of shape {tuple(weight.shape)}"
    outputs = (*z.shape[:-1], weight.shape[-2])
    check_shape("target" + layer, target, outputs, fits)
    if bias is not None:
        check_tensor("bias" + layer, bias, (dim - 1,))
        check_shape("bias" + layer, bias, weight.shape[:-1], f"for weight{layer} of shape {tuple(weight.shape)}")
    if multiplier is not None:
        check_tensor("multiplier" + layer, multiplier, (dim,))
        check_shape("multiplier" + layer, multiplier, outputs, fits)
    check_alike({name + layer: tensor for name, tensor in tensors.items()}, autocast)


def _as_stacks(tensors: dict[str, Tensor | Sequence[Tensor] | None]) -> list[dict[str, Tensor | None]]:
    """The layers as checked stacks: one stack for stacked tensors, for lists one for each layer, without the first
    dimension."""
    z = tensors["z"]
    if isinstance(z, Tensor):
        _check_tensors(tensors, "", 3, torch.is_autocast_enabled(z.device.type))
        return [tensors]
    if not isinstance(z, (list, tuple)):
        raise TypeError(f"z: expected a torch.Tensor or a list of them, got {type(z).__name__}")
    if len(z) == 0:
        raise ValueError("z: expected at least 1 layer, got an empty list")
    lists = {name: [None] * len(z) if x is None else x for name, x in tensors.items()}
    for name, x in lists.items():
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors because z is one, got {type(x).__name__}")
        if len(x) != len(z):
            raise ValueError(f"{name}: has {len(x)} layers, but z has {len(z)}")
    layers = [dict(zip(lists, layer, strict=True)) for layer in zip(*lists.values(), strict=True)]
    for t, layer in enumerate(layers):
        autocast = isinstance(layer["z"], Tensor) and torch.is_autocast_enabled(layer["z"].device.type)
        _check_tensors(layer, f"[{t}]", 2, autocast)
        check_alike({"z[0]": z[0], f"z[{t}]": layer["z"]}, autocast)
    return layers


def _n_layers(stack: dict[str, Tensor | None]) -> int:
    return n_layers_of(stack["z"].shape)


def _check_skip(skip: list[float], stacks: list[dict[str, Tensor | None]]) -> None:
    layers = (stack for stack in stacks for _ in range(_n_layers(stack)))
    for t, (c, layer) in enumerate(zip(skip, layers, strict=True)):
        d_in, d_out = layer["z"].shape[-1], layer["target"].shape[-1]
        if c != 0 and d_in != d_out:
            raise ValueError(f"skip: is {c} for layer {t}, which needs d_in == d_out, got {d_in} and {d_out}")


def _for_autocast(stack: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Under autocast the operands of the matrix products have its dtype, and all else is float32."""
    device = stack["z"].device.type
    if not torch.is_autocast_enabled(device) or stack["z"].dtype == torch.float64:
        return stack
    narrow = {name: x for name, x in stack.items() if name in ("weight", "bias") and x is not None}
    return {name: in_float32(x) for name, x in stack.items()} | {
        name: x.to(torch.get_autocast_dtype(device)) for name, x in narrow.items()
    }


def decoupled_linear_loss(
    z: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    target: Tensor | Sequence[Tensor],
    *,
    activation: str | Sequence[str] = "tanh",
    preactivation: bool = False,
    hidden_loss: str = "squared",
    kappa: float = 1.0,
    rho: float | Sequence[float] = 1.0,
    multiplier: Tensor | Sequence[Tensor | None] | None = None,
    skip: float | Sequence[float] = 0.0,
    branch_scale: float | Sequence[float] = 1.0,
) -> Tensor:
    """Local energies of all linear layers of a decoupled net at once: each layer is judged by its own input and target.

    For layer t with input z_t, target_t (the input of the next layer), skip coefficient c, branch scale s and
    multiplier lambda:

        a_t      = s * phi(z_t) W_t^T + b_t
        e_t      = target_t - (c * z_t + f(a_t))
        energy_t = sum over samples and units of  rho * L(e_t) + lambda_t * e_t
        L(e)     = e^2 / 2  for "squared";  e^2 / 2 up to |e| = kappa, then kappa (|e| - kappa / 2)  for "huber"

    where f is the activation and phi the identity, or with `preactivation` phi is the activation and f the identity.
    Given z and target the layers do not depend on each other: the method of auxiliary coordinates (Carreira-Perpinan &
    Wang 2014, arXiv:1212.5921), with multipliers as in Taylor et al. 2016, arXiv:1605.02026. With q = rho L'(e) +
    lambda and delta = -q f'(a): denergy/dtarget = q, denergy/dW = s delta^T phi(z), denergy/db = sum of delta, and
    denergy/dz = s phi'(z) (delta W) - c q. With z of the feed-forward pass and lambda minus backpropagation's dL/dz,
    these are backpropagation's gradients. Differentiable, twice and more, in all five tensors. Inputs are never
    modified.

    Args:
        z: (T, n, d_in), T layers of n samples; float64, float32, bfloat16 or float16; any strides. Sums are accumulated
            in float64 for float64 and in float32 otherwise. Where the layers' shapes differ, all tensors are lists
            with one tensor per layer and without the first dimension; layer t then has its own n, d_in and d_out, and
            its bias or multiplier may be None. All layers still go to the kernel at once; only a call of many small
            layers costs more than one of their stack.
        weight: (T, d_out, d_in).
        bias: (T, d_out), or None.
        target: (T, n, d_out).
        activation: "identity" | "relu" | "tanh" | "scaled_tanh" (1.7159 tanh(2 a / 3)) | "sigmoid" | "silu" | "gelu" |
            "gelu_tanh" | "leaky_relu" (slope 0.01), or a list with one name per layer.
        preactivation: whether the activation is applied to the layer's input instead of its raw logits.
        hidden_loss: "squared" | "huber".
        kappa: where huber becomes linear; positive, in the units of target.
        rho: weight of the hidden loss, not negative; one number, or one per layer.
        multiplier: lambda, (T, n, d_out), or None for 0.
        skip: c; one number, or one per layer. A layer with c != 0 needs d_in == d_out.
        branch_scale: s; one number, or one per layer.

    Returns:
        The energies (T,), in float64 for float64 and in float32 otherwise. Sums, not means. T layers give bit for bit
        what T calls with one layer give. Under autocast weight, bias and phi(z) are rounded to its dtype, as in
        `torch.nn.functional.linear`, and all else is float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device, value or name.
    """
    stacks = _as_stacks({"z": z, "weight": weight, "bias": bias, "target": target, "multiplier": multiplier})
    n_layers = sum(_n_layers(stack) for stack in stacks)
    codes, rhos = activation_codes(activation, n_layers), weights_of_energy(rho, n_layers)
    loss = hidden_loss_code(hidden_loss, kappa)
    skips, scales = layer_numbers("skip", skip, n_layers), layer_numbers("branch_scale", branch_scale, n_layers)
    _check_skip(skips, stacks)

    stacks = [_for_autocast(stack) for stack in stacks]
    need_residual = [is_needed([stack["multiplier"]]) for stack in stacks]
    need_gradient = [is_needed(stack.values()) for stack in stacks]
    per_layer, needs = (rhos, skips, scales), (need_residual, need_gradient)
    options = DecoupledLinearOptions(codes, bool(preactivation), loss, float(kappa), *per_layer, *needs)
    energies, *_ = decoupled_linear(options, *(stack[name] for name in stacks[0] for stack in stacks))
    return energies
