"""Autograd of decoupled_linear: first, second and higher derivatives, forward mode, vmap.

The Functions take and return the tensors of all stacks one after the other, first every z, then every weight and so on:
a Function sees no tensors inside of lists.

`DecoupledLinear` differentiates the energies; `DecoupledLinearBackward` is their gradient as a function of its own, so
that it can be differentiated again. From the second derivative on everything is plain PyTorch.

Outputs that only carry numbers to the backward pass (e, delta, q) have gradient None and tangent 0 instead of being
marked as not differentiable: torch.func.jvp of torch.func.vmap fails on the mark (torch 2.13).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lgd_kernels import ops, reference
from lgd_kernels.autograd.apply import apply
from lgd_kernels.autograd.second_order import gradient_of_tangent, tangent_of_gradients

_N_TENSORS = 5  # z, weight, bias, target, multiplier: so many for every stack
_N_MADE = 3  # e, delta, q


@dataclass(frozen=True)
class DecoupledLinearOptions:
    """The op's options; lists of numbers have one entry per layer, those of bools one per stack. One object, because
    torch.func takes lists apart."""

    activation: list[int]
    preactivation: bool
    hidden_loss: int
    kappa: float
    rho: list[float]
    skip: list[float]
    branch_scale: list[float]
    need_residual: list[bool]
    need_gradient: list[bool]

    @property
    def n_stacks(self) -> int:
        return len(self.need_gradient)


def _lists(flat: Sequence, n_stacks: int) -> list[list]:
    """Tensors one after the other as lists with one entry per stack."""
    return [list(flat[i : i + n_stacks]) for i in range(0, len(flat), n_stacks)]


def _tangent(o: DecoupledLinearOptions) -> Callable[..., Tensor]:
    """`reference.decoupled_linear_tangent` as a function of the tensors and their changes."""
    options = {"activation": o.activation, "preactivation": o.preactivation, "hidden_loss": o.hidden_loss}
    per_layer = {"rho": o.rho, "skip": o.skip, "branch_scale": o.branch_scale}
    tangent = functools.partial(reference.decoupled_linear_tangent, **options, kappa=o.kappa, **per_layer)
    return lambda *flat: tangent(*_lists(flat, o.n_stacks))


class DecoupledLinear(torch.autograd.Function):
    """(energy (T,), every stack's e, delta, q); the energy is differentiable in all five tensors of every stack.

    Where a gradient will be needed the forward pass also writes delta and q, and e for that of the multiplier, so that
    the backward pass need not repeat the matrix products.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(o, *tensors):
        options = (o.activation, o.preactivation, o.hidden_loss, o.kappa, o.rho, o.skip, o.branch_scale)
        no_step, needs = [0.0] * len(o.rho), (o.need_residual, o.need_gradient)
        energy, e, delta, q = ops.decoupled_linear(*_lists(tensors, o.n_stacks), *options, no_step, *needs)
        return energy, *e, *delta, *q

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, *tensors = inputs
        _, *made = output  # e, delta, q
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *made)
        ctx.save_for_forward(*tensors, *made)  # vmap wants the two lists equal

    @staticmethod
    def backward(ctx, grad_energy, *_made):
        _, *needed = ctx.needs_input_grad
        if grad_energy is None:
            return None, *(None for _ in needed)
        gradients = decoupled_linear_backward(ctx.options, grad_energy, *ctx.saved_tensors, *needed)
        return None, *(g if need else None for g, need in zip(gradients, needed, strict=True))


def _tensors_and_made(given: Sequence, o: DecoupledLinearOptions) -> tuple[Sequence, Sequence]:
    """What was given to the forward pass, and e, delta and q."""
    n_tensors = _N_TENSORS * o.n_stacks
    return given[:n_tensors], given[n_tensors:]


class DecoupledLinearBackward(torch.autograd.Function):
    """The gradients of the tensors that are `needed`, as a function of the tensors and of grad_energy. What follows
    from the tensors (e, delta, q) is handed in to save the work. A gradient that is not needed has no elements."""

    generate_vmap_rule = True

    @staticmethod
    def forward(o, grad_energy, *given_and_needed):
        z, weight, _bias, _target, _multiplier, *made_and_needed = _lists(given_and_needed, o.n_stacks)
        made, needed = made_and_needed[:_N_MADE], made_and_needed[_N_MADE:]
        options = (o.activation, o.preactivation, o.skip, o.branch_scale)
        gradients = ops.decoupled_linear_backward(z, weight, *made, grad_energy, *options, *needed)
        return tuple(gradient for stacks in gradients for gradient in stacks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, grad_energy, *given_and_needed = inputs
        n_given = (_N_TENSORS + _N_MADE) * ctx.options.n_stacks
        given, ctx.needed = given_and_needed[:n_given], given_and_needed[n_given:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_energy, *given)
        ctx.save_for_forward(grad_energy, *given)

    @staticmethod
    def backward(ctx, *directions):
        grad_energy, *given = ctx.saved_tensors
        directions = [v if need else None for v, need in zip(directions, ctx.needed, strict=True)]
        tensors, made = _tensors_and_made(given, ctx.options)
        gradients, change = gradient_of_tangent(_tangent(ctx.options), tensors, directions, grad_energy)
        return None, change, *gradients, *(None for _ in made), *(None for _ in ctx.needed)


class _DecoupledLinearForwardMode(DecoupledLinear):
    """With the rule for forward-mode differentiation, which torch.compile cannot trace (torch 2.13)."""

    @staticmethod
    def jvp(ctx, *tangents):
        tensors, made = _tensors_and_made(ctx.saved_tensors, ctx.options)
        change = _tangent(ctx.options)(*tensors, *tangents[1:])
        return change, *(torch.zeros_like(x) for x in made)


class _DecoupledLinearBackwardForwardMode(DecoupledLinearBackward):
    """With the rule for forward-mode differentiation, which torch.compile cannot trace (torch 2.13)."""

    @staticmethod
    def jvp(ctx, *tangents):
        grad_energy, *given = ctx.saved_tensors
        _, grad_energy_t, *tangents = tangents
        tensors, _ = _tensors_and_made(given, ctx.options)
        by_inputs, _ = gradient_of_tangent(_tangent(ctx.options), tensors, tangents[: len(tensors)], grad_energy)
        by_upstream = None
        if grad_energy_t is not None:
            by_upstream = decoupled_linear_backward(ctx.options, grad_energy_t, *given, *ctx.needed)
        return tangent_of_gradients(by_inputs, by_upstream, ctx.needed, without=grad_energy.new_zeros(0))


def decoupled_linear(*args) -> tuple[Tensor, ...]:
    """`ops.decoupled_linear` without a dual step, differentiable: from the options and the tensors of all stacks."""
    return apply(DecoupledLinear, _DecoupledLinearForwardMode, args)


def decoupled_linear_backward(*args) -> tuple[Tensor, ...]:
    """The gradients of the tensors from what the forward pass made, differentiable."""
    return apply(DecoupledLinearBackward, _DecoupledLinearBackwardForwardMode, args)
