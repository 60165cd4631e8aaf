"""decoupled_linear in plain PyTorch: one matrix product per layer, never a batched one, whose bits would depend on T.

Lists of tensors have one entry per stack of layers: z (T_i, n, d_in), weight (T_i, d_out, d_in), bias (T_i, d_out) or
None, target (T_i, n, d_out), multiplier (T_i, n, d_out) or None; n, d_in and d_out are the stack's own. A stack whose
tensors all lack the first dimension is one layer. Lists of numbers have one entry per layer, and what is said of all
layers has them in order, T = sum of T_i; how layers are cut into stacks does not matter. All z, targets and multipliers
share a dtype; a stack's weight and bias share one that may be narrower, and then the operands of the products are
rounded to it. Everything is accumulated in float64 for float64 z, in float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

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


def n_layers_of(shape_of_z: Sequence[int]) -> int:
    """The number of layers of a stack (T, n, d_in), or of one layer (n, d_in)."""
    return 1 if len(shape_of_z) == 2 else shape_of_z[0]


def stack_by_stack(counts: Iterable[int], *per_layer: Sequence) -> Iterator[tuple[Sequence, ...]]:
    """For every stack, of so many layers, their entries of lists with one per layer."""
    begin = 0
    for count in counts:
        yield tuple(entries[begin : begin + count] for entries in per_layer)
        begin += count


def _with_first_dimension(z: Sequence[Tensor], *others: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """The lists with single layers as stacks of one."""
    return [
        [x.unsqueeze(0) if x is not None and of_z.dim() == 2 else x for x, of_z in zip(stacks, z, strict=True)]
        for stacks in (z, *others)
    ]


def _as_given(z: Sequence[Tensor], made: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """What was made for every stack as lists with one entry per stack, those of single layers without the first
    dimension, like z; what was not asked for has no other."""
    rows = [
        [x.squeeze(0) if of_z.dim() == 2 and x.dim() > 1 else x for x in of_stack]
        for of_stack, of_z in zip(made, z, strict=True)
    ]
    return [list(stacks) for stacks in zip(*rows, strict=True)]


def _judge(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    lambda_: Tensor | None,
    functions: tuple[int, int],
    hidden_loss: int,
    kappa: float,
    rho: float,
    skip: float,
    branch_scale: float,
    dual_step: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, e, energy, q) of one layer."""
    phi, f = functions
    a = layer_logits(x, w, b, phi, branch_scale)
    e = layer_residual(a, y, x, f, skip)
    return a, e, *layer_energy(e, lambda_, hidden_loss, kappa, rho, dual_step)


def decoupled_linear(
    z: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor | None],
    target: list[Tensor],
    multiplier: list[Tensor | None],
    activation: list[int],
    preactivation: bool,
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    branch_scale: list[float],
    dual_step: list[float],
    need_residual: list[bool],
    need_gradient: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Energy (T,) of every layer; for stacks on request the residual e; on request delta and q, each (T_i, n, d_out).

        a      = branch_scale * phi(z) W^T + b               phi = identity, or f = identity with `preactivation`
        e      = target - (skip * z + f(a))
        lambda = multiplier + dual_step * e                  the multiplier after its update, which the caller stores
        energy = sum of rho * L(e) + lambda * e over samples and units
        q      = rho * L'(e) + lambda                        = dE/dtarget at constant lambda
        delta  = -q * f'(a)                                  = dE/da, from which `decoupled_linear_backward` goes on

    need_residual, need_gradient: what is asked for, for every stack. Energies have the accumulation type, the other
    outputs the dtype of z; what is not asked for has no elements.
    """
    accumulate, given = accumulation_dtype(z[0].dtype), z
    z, weight, bias, target, multiplier = _with_first_dimension(z, weight, bias, target, multiplier)
    numbers = stack_by_stack((x.shape[0] for x in z), activation, rho, skip, branch_scale, dual_step)
    stacks = zip(z, weight, bias, target, multiplier, numbers, need_residual, need_gradient, strict=True)
    energies, made = [], []
    for xs, ws, bs, ys, lambdas, per_layer, need_e, need_q in stacks:
        tensors = (layers_of(x, xs.shape[0], accumulate) for x in (xs, bs, ys, lambdas))
        residuals, deltas, qs = [], [], []
        for w, x, b, y, lambda_, code, *options in zip(ws, *tensors, *per_layer, strict=True):
            functions = functions_of(code, preactivation)
            a, e, energy, q = _judge(x, w, b, y, lambda_, functions, hidden_loss, kappa, *options)
            energies.append(energy)
            residuals.append(e)
            if need_q:
                deltas.append(times_derivative(functions[1], a, -q))
                qs.append(q)
        outputs = ((residuals, need_e), (deltas, need_q), (qs, need_q))
        made.append([stacked(layers, ys.shape[1:], xs, xs.dtype, need) for layers, need in outputs])
    return stacked(energies, (), z[0], accumulate), *_as_given(given, made)


def _gradients_of_layer(
    x: Tensor,
    w: Tensor,
    e: Tensor | None,
    delta: Tensor | None,
    q: Tensor | None,
    phi: int,
    skip: float,
    branch_scale: float,
    upstream: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of z, weight, bias, target and multiplier; None where it is not needed."""
    accumulate, g = x.dtype, 1.0 if upstream is None else upstream
    of_z, of_weight, of_bias, of_target, of_multiplier = [None] * 5
    need_z, need_weight, need_bias, need_target, need_multiplier = needed
    if need_z:
        of_z = times_derivative(phi, x, branch_scale * g * product(delta, w, accumulate))
        if skip != 0:
            of_z = of_z - skip * g * q
    if need_weight:
        of_weight = branch_scale * g * product(delta.t(), activate(phi, x).to(w.dtype), accumulate)
    if need_bias:
        of_bias = g * delta.to(accumulate).sum(0)
    if need_target:
        of_target = g * q
    if need_multiplier:
        of_multiplier = g * e
    return of_z, of_weight, of_bias, of_target, of_multiplier


def decoupled_linear_backward(
    z: list[Tensor],
    weight: list[Tensor],
    e: list[Tensor],
    delta: list[Tensor],
    q: list[Tensor],
    grad_energy: Tensor | None,
    activation: list[int],
    preactivation: bool,
    skip: list[float],
    branch_scale: list[float],
    need_z: list[bool],
    need_weight: list[bool],
    need_bias: list[bool],
    need_target: list[bool],
    need_multiplier: list[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of sum(grad_energy * energy) with respect to all five tensors, from what the forward pass made.

        dz      = grad_energy * (branch_scale * phi'(z) * (delta W) - skip * q)
        dW      = grad_energy * branch_scale * delta^T phi(z)
        db      = grad_energy * sum of delta over the samples
        dtarget = grad_energy * q
        dlambda = grad_energy * e

    Without grad_energy (T,) it counts as 1. need_z and so on: what is asked for, for every stack; what is not has no
    elements, and e, delta and q are read only for what needs them. dW and db have the dtype of the weight, the others
    that of z. With these formulas any delta = dL/da may be carried on, that of an output layer too.
    """
    accumulate, given = accumulation_dtype(z[0].dtype), z
    z, weight, e, delta, q = _with_first_dimension(z, weight, e, delta, q)
    upstream = layers_of(grad_energy, sum(x.shape[0] for x in z), accumulate)
    numbers = stack_by_stack((x.shape[0] for x in z), activation, skip, branch_scale, upstream)
    needs = zip(need_z, need_weight, need_bias, need_target, need_multiplier, strict=True)
    made = []
    for xs, ws, es, deltas, qs, per_layer, needed in zip(z, weight, e, delta, q, numbers, needs, strict=True):
        of_z, of_weight, of_bias, of_target, of_multiplier = needed
        tensors = (
            layers_of(xs, len(xs), accumulate),
            ws,
            layers_of(es if of_multiplier else None, len(xs), accumulate),
            layers_of(deltas if of_z or of_weight or of_bias else None, len(xs), deltas.dtype),
            layers_of(qs if of_z or of_target else None, len(xs), accumulate),
        )
        layers = [
            _gradients_of_layer(x, w, r, d, pull, functions_of(code, preactivation)[0], *options, needed)
            for x, w, r, d, pull, code, *options in zip(*tensors, *per_layer, strict=True)
        ]
        outputs = (xs.shape[1], ws.shape[1])  # (n, d_out)
        shapes = ((xs.shape[1:], xs.dtype), (ws.shape[1:], ws.dtype), (ws.shape[1:2], ws.dtype))
        shapes += ((outputs, xs.dtype), (outputs, xs.dtype))
        made.append(
            [
                stacked([layer[i] for layer in layers], shape, xs, dtype, needed[i])
                for i, (shape, dtype) in enumerate(shapes)
            ]
        )
    return tuple(_as_given(given, made))


def decoupled_linear_tangent(
    z: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    target: Sequence[Tensor],
    multiplier: Sequence[Tensor | None],
    z_t: Sequence[Tensor | None],
    weight_t: Sequence[Tensor | None],
    bias_t: Sequence[Tensor | None],
    target_t: Sequence[Tensor | None],
    multiplier_t: Sequence[Tensor | None],
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
    accumulate, others = accumulation_dtype(z[0].dtype), (bias, target, multiplier, z_t, bias_t, target_t, multiplier_t)
    z, weight, weight_t, *others = _with_first_dimension(z, weight, weight_t, *others)
    numbers = stack_by_stack((x.shape[0] for x in z), activation, rho, skip, branch_scale)
    tangents = []
    for xs, ws, ws_t, per_layer, *stacks in zip(z, weight, weight_t, numbers, *others, strict=True):
        tensors = (layers_of(x, xs.shape[0], accumulate) for x in (xs, *stacks))
        weights_t = [None] * xs.shape[0] if ws_t is None else ws_t
        for w, w_t, x, b, y, lambda_, x_t, b_t, y_t, lambda_t, code, r, c, scale in zip(
            ws, weights_t, *tensors, *per_layer, strict=True
        ):
            phi, f = functions_of(code, preactivation)
            a, e, _, q = _judge(x, w, b, y, lambda_, (phi, f), hidden_loss, kappa, r, c, scale)
            a_t, e_t = torch.zeros_like(a), torch.zeros_like(e)
            if x_t is not None:
                a_t = a_t + scale * product(times_derivative(phi, x, x_t), w.t(), accumulate)
                if c != 0:
                    e_t = e_t - c * x_t
            if w_t is not None:
                a_t = a_t + scale * product(activate(phi, x), w_t.t(), accumulate)
            if b_t is not None:
                a_t = a_t + b_t
            if y_t is not None:
                e_t = e_t + y_t
            tangent = q * (e_t - times_derivative(f, a, a_t))
            if lambda_t is not None:
                tangent = tangent + lambda_t * e
            tangents.append(tangent.sum(1).sum(0))
    return stacked(tangents, (), z[0], accumulate)
