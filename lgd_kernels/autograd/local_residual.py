"""Autograd of local_residual: first, second and higher derivatives, forward mode, vmap.

`LocalResidual` differentiates the energies; `LocalResidualBackward` is their gradient as a function of its own, so that
it can be differentiated again. From the second derivative on everything is plain PyTorch.

Outputs that only carry numbers to the backward pass (e, delta, q) have gradient None and tangent 0 instead of being
marked as not differentiable: torch.func.jvp of torch.func.vmap fails on the mark (torch 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lgd_kernels import ops, reference
from lgd_kernels.autograd.apply import apply
from lgd_kernels.autograd.second_order import gradient_of_tangent, scaled_by_layer, tangent_of_gradients, times_option

_N_TENSORS = 4  # logits, target, multiplier, skip_input
_N_GIVEN = _N_TENSORS + 3  # and e, delta, q


@dataclass(frozen=True)
class LocalResidualOptions:
    """The op's options; lists have one entry per layer. One object, because torch.func takes lists apart."""

    activation: list[int]
    hidden_loss: int
    kappa: float
    rho: list[float]
    skip: list[float]


def _tangent(o: LocalResidualOptions) -> Callable[..., Tensor]:
    """`reference.local_residual_tangent` as a function of the tensors and their changes."""
    options = {"activation": o.activation, "hidden_loss": o.hidden_loss, "kappa": o.kappa}
    return functools.partial(reference.local_residual_tangent, **options, rho=o.rho, skip=o.skip)


class LocalResidual(torch.autograd.Function):
    """(energy, e, delta, q) of every layer; the energy is differentiable in all four tensors.

    Where a gradient will be needed the forward pass also writes delta and q, and e for that of the multiplier: every
    gradient is a multiple of one of them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target, multiplier, skip_input, o, need_residual, need_gradient):
        tensors, no_step = (logits, target, multiplier, skip_input), [0.0] * len(o.rho)
        options = (o.activation, o.hidden_loss, o.kappa, o.rho, o.skip, no_step)
        return ops.local_residual(*tensors, *options, need_residual, need_gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[:_N_TENSORS], inputs[_N_TENSORS]
        _, *made = output  # e, delta, q
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *made)
        ctx.save_for_forward(*tensors, *made)  # vmap wants the two lists equal

    @staticmethod
    def backward(ctx, grad_energy, _e, _delta, _q):
        if grad_energy is None:
            return (None,) * (_N_TENSORS + 3)
        needed = ctx.needs_input_grad[:_N_TENSORS]
        gradients = local_residual_backward(*ctx.saved_tensors, grad_energy, ctx.options, *needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


class LocalResidualBackward(torch.autograd.Function):
    """The gradients of the tensors that are `needed`, as a function of the tensors and of grad_energy. What follows
    from the tensors (e, delta, q) is handed in to save the work. A gradient that is not needed has no elements."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits,
        target,
        multiplier,
        skip_input,
        e,
        delta,
        q,
        grad_energy,
        o,
        need_logits,
        need_target,
        need_multiplier,
        need_skip_input,
    ):
        dtype = logits.dtype
        return (
            scaled_by_layer(grad_energy, delta, dtype, need_logits),
            scaled_by_layer(grad_energy, q, dtype, need_target),
            scaled_by_layer(grad_energy, e, dtype, need_multiplier),
            scaled_by_layer(times_option(-grad_energy, o.skip), q, dtype, need_skip_input),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        given, grad_energy, ctx.options = inputs[:_N_GIVEN], inputs[_N_GIVEN], inputs[_N_GIVEN + 1]
        ctx.needed = inputs[_N_GIVEN + 2 :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, grad_energy)
        ctx.save_for_forward(*given, grad_energy)

    @staticmethod
    def backward(ctx, *directions):
        *given, grad_energy = ctx.saved_tensors
        directions = [v if need else None for v, need in zip(directions, ctx.needed, strict=True)]
        gradients, change = gradient_of_tangent(_tangent(ctx.options), given[:_N_TENSORS], directions, grad_energy)
        return *gradients, None, None, None, change, None, *(None,) * _N_TENSORS


class _LocalResidualForwardMode(LocalResidual):
    """With the rule for forward-mode differentiation, which torch.compile cannot trace (torch 2.13)."""

    @staticmethod
    def jvp(ctx, *tangents):
        tensors, made = ctx.saved_tensors[:_N_TENSORS], ctx.saved_tensors[_N_TENSORS:]
        change = _tangent(ctx.options)(*tensors, *tangents[:_N_TENSORS])
        return change, *(torch.zeros_like(x) for x in made)


class _LocalResidualBackwardForwardMode(LocalResidualBackward):
    """With the rule for forward-mode differentiation, which torch.compile cannot trace (torch 2.13)."""

    @staticmethod
    def jvp(ctx, *tangents):
        *given, grad_energy = ctx.saved_tensors
        tensors, grad_energy_t = given[:_N_TENSORS], tangents[_N_GIVEN]
        by_inputs, _ = gradient_of_tangent(_tangent(ctx.options), tensors, tangents[:_N_TENSORS], grad_energy)
        by_upstream = None
        if grad_energy_t is not None:
            by_upstream = local_residual_backward(*given, grad_energy_t, ctx.options, *ctx.needed)
        return tangent_of_gradients(by_inputs, by_upstream, ctx.needed, without=grad_energy.new_zeros(0))


def local_residual(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.local_residual` without a dual step, differentiable."""
    return apply(LocalResidual, _LocalResidualForwardMode, args)


def local_residual_backward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the tensors from what the forward pass made, differentiable."""
    return apply(LocalResidualBackward, _LocalResidualBackwardForwardMode, args)
