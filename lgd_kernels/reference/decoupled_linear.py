"""decoupled_linear in plain PyTorch: one matrix product per layer, never a batched one, whose bits would depend on T.

Shapes: z (T, n, d_in), weight (T, d_out, d_in), bias (T, d_out), target and multiplier (T, n, d_out). Lists have one
entry per layer. z, target and multiplier share a dtype; weight and bias share one that may be narrower, and then the
operands of the products are rounded to it. Everything is accumulated in float64 for float64 z, in float32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels.reference.activations import IDENTITY, activate, times_derivative
from lgd_kernels.reference.local_residual import layer_energy, layer_residual, layers_of, stacked
from lgd_kernels.reference.softmax_infogain import accumulation_dtype


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b accumulated in `dtype`, with both operands rounded to the dtype of b first.

    The operands are copied, because the bits of a library's product depend on where its operands start in memory, and
    the layers of a stack do not all start at a multiple of 64 bytes.
    """
    a, b = a.to(b.dtype, copy=True).to(dtype), b.to(dtype, copy=True)
    if not torch.is_autocast_enabled(a.device.type):
        return torch.mm(a, b)
    with torch.autocast(a.device.type, enabled=False):  # it would round the sums too
        return torch.mm(a, b)


def functions_of(activation: int, preactivation: bool) -> tuple[int, int]:
    """(phi, f): what is applied to the layer's input and to its raw logits."""
    return (activation, IDENTITY) if preactivation else (IDENTITY, activation)


def layer_logits(z: Tensor, weight: Tensor, bias: Tensor | None, phi: int, branch_scale: float) -> Tensor:
    """a = branch_scale * phi(z) W^T + b of one layer, for z (n, d_in) in the accumulation type."""
    logits = branch_scale * product(activate(phi, z), weight.t(), z.dtype)
    return logits if bias is None else logits + bias.to(z.dtype)


def decoupled_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    multiplier: Tensor | None,
    activation: list[int],
    preactivation: bool,
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    branch_scale: list[float],
    dual_step: list[float],
    need_residual: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (T,) of every layer; on request its residual e; on request delta and q, each (T, n, d_out).

        a      = branch_scale * phi(z) W^T + b               phi = identity, or f = identity with `preactivation`
        e      = target - (skip * z + f(a))
        lambda = multiplier + dual_step * e                  the multiplier after its update, which the caller stores
        energy = sum of rho * L(e) + lambda * e over samples and units
        q      = rho * L'(e) + lambda                        = dE/dtarget at constant lambda
        delta  = -q * f'(a)                                  = dE/da, from which `decoupled_linear_backward` goes on

    Energies have the accumulation type, the other outputs the dtype of z; what is not asked for has no elements.
    """
    accumulate = accumulation_dtype(z.dtype)
    tensors = (layers_of(x, z.shape[0], accumulate) for x in (z, bias, target, multiplier))
    energies, residuals, deltas, qs = [], [], [], []
    for t, (x, b, y, lambda_) in enumerate(zip(*tensors, strict=True)):
        phi, f = functions_of(activation[t], preactivation)
        a = layer_logits(x, weight[t], b, phi, branch_scale[t])
        e = layer_residual(a, y, x, f, skip[t])
        energy, q = layer_energy(e, lambda_, hidden_loss, kappa, rho[t], dual_step[t])
        energies.append(energy)
        residuals.append(e)
        if need_gradient:
            deltas.append(times_derivative(f, a, -q))
            qs.append(q)
    shape = target.shape[1:]
    return (
        stacked(energies, (), z, accumulate),
        stacked(residuals, shape, z, z.dtype, need_residual),
        stacked(deltas, shape, z, z.dtype, need_gradient),
        stacked(qs, shape, z, z.dtype, need_gradient),
    )


def decoupled_linear_backward(
    z: Tensor,
    weight: Tensor,
    delta: Tensor,
    q: Tensor,
    grad_energy: Tensor | None,
    activation: list[int],
    preactivation: bool,
    skip: list[float],
    branch_scale: list[float],
    need_z: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(grad_energy * energy) with respect to z, weight and bias, from the forward pass's delta and q.

        dz = grad_energy * (branch_scale * phi'(z) * (delta W) - skip * q)
        dW = grad_energy * branch_scale * delta^T phi(z)
        db = grad_energy * sum of delta over the samples

    Without grad_energy (T,) it counts as 1. dz has the dtype of z, dW and db that of the weight; what is not asked for
    has no elements. With these formulas any delta = dL/da may be carried on, that of an output layer too.
    """
    accumulate = accumulation_dtype(z.dtype)
    tensors = (layers_of(x, z.shape[0], accumulate) for x in (z, q, grad_energy))
    grad_z, grad_weight, grad_bias = [], [], []
    for t, (x, of_target, upstream) in enumerate(zip(*tensors, strict=True)):
        phi, _ = functions_of(activation[t], preactivation)
        scale = branch_scale[t] if upstream is None else branch_scale[t] * upstream
        if need_z:
            gradient = times_derivative(phi, x, scale * product(delta[t], weight[t], accumulate))
            if skip[t] != 0:
                gradient = gradient - (skip[t] if upstream is None else skip[t] * upstream) * of_target
            grad_z.append(gradient)
        if need_weight:
            operand = activate(phi, x).to(weight.dtype)
            grad_weight.append(scale * product(delta[t].t(), operand, accumulate))
        if need_bias:
            gradient = delta[t].to(accumulate).sum(0)
            grad_bias.append(gradient if upstream is None else upstream * gradient)
    return (
        stacked(grad_z, z.shape[1:], z, z.dtype, need_z),
        stacked(grad_weight, weight.shape[1:], z, weight.dtype, need_weight),
        stacked(grad_bias, weight.shape[1:2], z, weight.dtype, need_bias),
    )


def decoupled_linear_tangent(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    multiplier: Tensor | None,
    z_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    target_t: Tensor | None,
    multiplier_t: Tensor | None,
    activation: list[int],
    preactivation: bool,
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    branch_scale: list[float],
) -> Tensor:
    """The change (T,) of the energies when the inputs change by the tangents (names in _t; None is no change).

        a_t      = branch_scale * ((phi'(z) * z_t) W^T + phi(z) W_t^T) + b_t
        e_t      = target_t - skip * z_t - f'(a) * a_t
        energy_t = sum of q * e_t + multiplier_t * e

    Differentiable in everything, which gives the second derivatives of the energies.
    """
    accumulate = accumulation_dtype(z.dtype)
    stacks = (z, bias, target, multiplier, z_t, bias_t, target_t, multiplier_t)
    tensors = (layers_of(x, z.shape[0], accumulate) for x in stacks)
    tangents = []
    for t, (x, b, y, lambda_, x_t, b_t, y_t, lambda_t) in enumerate(zip(*tensors, strict=True)):
        phi, f = functions_of(activation[t], preactivation)
        a = layer_logits(x, weight[t], b, phi, branch_scale[t])
        e = layer_residual(a, y, x, f, skip[t])
        _, q = layer_energy(e, lambda_, hidden_loss, kappa, rho[t], 0.0)
        a_t, e_t = torch.zeros_like(a), torch.zeros_like(e)
        if x_t is not None:
            a_t = a_t + branch_scale[t] * product(times_derivative(phi, x, x_t), weight[t].t(), accumulate)
            if skip[t] != 0:
                e_t = e_t - skip[t] * x_t
        if weight_t is not None:
            a_t = a_t + branch_scale[t] * product(activate(phi, x), weight_t[t].t(), accumulate)
        if b_t is not None:
            a_t = a_t + b_t
        if y_t is not None:
            e_t = e_t + y_t
        tangent = q * (e_t - times_derivative(f, a, a_t))
        if lambda_t is not None:
            tangent = tangent + lambda_t * e
        tangents.append(tangent.sum(1).sum(0))
    return stacked(tangents, (), z, accumulate)
