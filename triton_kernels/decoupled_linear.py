"""decoupled_linear and its backward in Triton: three products of matrices over all layers, see linear_kernels.py.

The functions have the signatures and the results of `reference/decoupled_linear.py`, which says what they compute. A
launch is over all tiles of all layers of one shape and activation, those of a stack or single ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layers import LayerNumbers, ResidualIo, accumulation_dtype, groups_of, stack_layers, sum_energy
from .linear_launches import (
    Sizes,
    launch_bias_gradient,
    launch_forward,
    launch_input_gradient,
    launch_weight_gradient,
    phi_and_f,
)
from .linear_tiles import arithmetic

OPS = ("decoupled_linear", "decoupled_linear_backward")


def _check(z: Sequence[Tensor], **others: tuple[Sequence[Tensor | None], Sequence[tuple[int, ...]]]) -> None:
    """No kernel may read beyond its arguments, whoever calls the op. others: tensors, and the shapes they must have."""
    for name, (tensors, shapes) in others.items():
        if len(tensors) != len(z):
            raise ValueError(f"{name}: has {len(tensors)} stacks, but z has {len(z)}")
        for x, shape in zip(tensors, shapes, strict=True):
            if x is not None and x.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")


def _shapes(z: Sequence[Tensor], weight: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """What the shapes of the weights must be for z, and those of the layers' outputs."""
    both = list(zip(z, weight, strict=True))
    weights = [(*x.shape[:-2], w.shape[-2], x.shape[-1]) for x, w in both]
    return weights, [(*x.shape[:-1], w.shape[-2]) for x, w in both]


def _outputs(
    wanted: Sequence[bool], like: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(an output for every stack, one without elements where it is not wanted; the same with None there)."""
    made = [
        x.new_empty(shape if want else (0,), dtype=as_in.dtype)
        for want, x, shape, as_in in zip(wanted, like, shapes, dtypes, strict=True)
    ]
    return made, _if(wanted, made)


def _if(wanted: Sequence[bool], stacks: Sequence[Tensor]) -> list[Tensor | None]:
    return [x if want else None for x, want in zip(stacks, wanted, strict=True)]


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
    """Energy (T,) of every layer; for stacks on request the residual e; on request delta and q, (T_i, n, d_out)."""
    weights, outputs = _shapes(z, weight)
    biases = [shape[:-1] for shape in weights]
    _check(z, weight=(weight, weights), bias=(bias, biases), target=(target, outputs), multiplier=(multiplier, outputs))
    residual, to_residual = _outputs(need_residual, z, outputs, z)
    delta, to_delta = _outputs(need_gradient, z, outputs, z)
    q, to_q = _outputs(need_gradient, z, outputs, z)
    accumulate = accumulation_dtype(z[0].dtype)
    energy = z[0].new_empty(len(activation), dtype=accumulate)
    per_layer = zip(rho, skip, branch_scale, dual_step, strict=True)
    numbers = [LayerNumbers(*of_layer, kappa) for of_layer in per_layer]
    lists = (z, weight, bias, target, multiplier)
    for group in groups_of(lists, activation, need_residual, need_gradient):
        stack, layers = group.stacks[0], group.layers
        phi, f = phi_and_f(activation[layers[0]], preactivation)
        io = ResidualIo(
            target=group.of(target),
            multiplier=group.of(multiplier),
            skip_input=group.of(z) if any(skip[t] for t in layers) else None,
            residual=group.of(to_residual),
            delta=group.of(to_delta),
            q=group.of(to_q),
        )
        partial = launch_forward(
            _sizes(layers, z[stack], weight[stack]),
            group.operand(z),
            group.operand(weight),
            group.of(bias),
            io,
            [numbers[t] for t in layers],
            arithmetic(z[stack].dtype, weight[stack].dtype),
            phi,
            f,
            hidden_loss,
        )
        sum_energy(partial, energy, layers)
    return energy, residual, delta, q


def _sizes(layers: Sequence[int], z: Tensor, weight: Tensor) -> Sizes:
    return Sizes(len(layers), *z.shape[-2:], weight.shape[-2])


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
    """Gradients of sum(grad_energy * energy) with respect to all five tensors, from what the forward pass made."""
    weights, outputs = _shapes(z, weight)
    need_parameters = [a or b for a, b in zip(need_weight, need_bias, strict=True)]
    delta = _if([a or b for a, b in zip(need_z, need_parameters, strict=True)], delta)
    of_target, of_multiplier = _if(need_target, q), _if(need_multiplier, e)
    q = _if(need_z, q)
    _check(z, weight=(weight, weights), delta=(delta, outputs), q=(q, outputs))
    _check(z, q=(of_target, outputs), e=(of_multiplier, outputs))
    grad_z, to_z = _outputs(need_z, z, [x.shape for x in z], z)
    grad_weight, to_weight = _outputs(need_weight, z, weights, weight)
    grad_bias, to_bias = _outputs(need_bias, z, [shape[:-1] for shape in weights], weight)
    accumulate = accumulation_dtype(z[0].dtype)
    if grad_energy is not None:
        _check([grad_energy], grad_energy=([grad_energy], [(len(activation),)]))
    numbers = [LayerNumbers(skip=c, branch_scale=s) for c, s in zip(skip, branch_scale, strict=True)]
    lists = (z, weight, delta, q)
    for group in groups_of(lists, activation, need_z, need_weight, need_bias):
        stack, layers = group.stacks[0], group.layers
        if delta[stack] is None:
            continue
        sizes = _sizes(layers, z[stack], weight[stack])
        phi, _ = phi_and_f(activation[layers[0]], preactivation)
        how = arithmetic(z[stack].dtype, weight[stack].dtype)
        of_z, of_delta, upstream = group.operand(z), group.operand(delta), stack_layers(grad_energy, layers)
        of_group = [numbers[t] for t in layers]
        if need_z[stack]:
            of_q = group.of(q) if any(skip[t] for t in layers) else None
            of_weight = group.operand(weight)
            launch_input_gradient(
                sizes, of_z.layers, of_weight, of_delta, of_q, upstream, group.of(to_z), of_group, how, phi
            )  # fmt: skip
        if need_weight[stack]:
            launch_weight_gradient(sizes, of_z, of_delta, upstream, group.of(to_weight), of_group, how, phi)
        if need_bias[stack]:
            launch_bias_gradient(sizes, of_delta.layers, upstream, group.of(to_bias), how)
    grad_target = _scaled(of_target, grad_energy, z, accumulate)
    return grad_z, grad_weight, grad_bias, grad_target, _scaled(of_multiplier, grad_energy, z, accumulate)


def _scaled(
    stacks: Sequence[Tensor | None], factors: Tensor | None, like: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What was wanted, times the factor of every layer, as new contiguous tensors."""
    made, begin = [], 0
    for x, of_stack in zip(stacks, like, strict=True):
        count = 1 if of_stack.dim() == 2 else len(of_stack)
        if x is None:
            made.append(of_stack.new_empty(0))
        elif factors is None:
            made.append(x.clone(memory_format=torch.contiguous_format))
        else:
            of_layers = factors[begin : begin + count].to(dtype).view(-1, 1, 1)
            result = of_stack.new_empty(x.shape)
            result.view(count, *x.shape[-2:]).copy_(x.reshape(count, *x.shape[-2:]) * of_layers)
            made.append(result)
        begin += count
    return made
