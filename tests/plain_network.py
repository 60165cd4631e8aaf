"""A decoupled net in plain PyTorch: its energies by its own modules, their gradients by autograd, a visit spelled out.
It uses the modules in `net.layers` and nothing else of lgd_kernels.

A result of lgd_kernels in float32 may be as far from the same in float64 as twice what plain PyTorch in float32 is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from oracle import array
from tolerance import assert_accurate
from torch import Tensor, nn


class Batch(NamedTuple):
    """Samples, and where they are."""

    x: Tensor
    z: list[Tensor]
    target: Tensor
    multiplier: list[Tensor] | None

    def to(self, dtype: torch.dtype) -> Batch:
        """A copy in this dtype; labels and other integers keep theirs."""

        def of(tensor: Tensor) -> Tensor:
            return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

        lists = [None if values is None else [of(v) for v in values] for values in (self.z, self.multiplier)]
        return Batch(of(self.x), lists[0], of(self.target), lists[1])


class Options(NamedTuple):
    rho: float = 1.0
    head: Callable[[Tensor, Tensor], Tensor] = nn.CrossEntropyLoss(reduction="sum")
    hidden_loss: nn.Module = nn.MSELoss(reduction="none")
    factor: float = 0.5  # MSELoss has none

    def energy(self, target: Tensor, prediction: Tensor, multiplier: Tensor | None) -> Tensor:
        energy = self.rho * self.factor * self.hidden_loss(prediction, target)
        return (energy if multiplier is None else energy + multiplier * (target - prediction)).sum()


class Results(NamedTuple):
    energies: list[Tensor]
    residuals: list[Tensor]
    of_z: list[Tensor]
    of_parameters: dict[str, Tensor]  # sums over the samples


def random_batch(net: nn.Module, x: Tensor, target: Tensor, *, multiplier: bool = True) -> Batch:
    """With hidden values near those of the net fed forward."""
    values = [value.detach() for value in fed_forward(net, x)[:-1]]
    near = [value + 0.5 * torch.randn_like(value) for value in values]
    return Batch(x, near, target, [torch.randn_like(value) for value in values] if multiplier else None)


def fed_forward(net: nn.Module, x: Tensor) -> list[Tensor]:
    """z_1 .. z_T of the ordinary net, with the graph."""
    values = []
    for layer in net.layers:
        x = layer(x)
        values.append(x)
    return values


def adjoint(net: nn.Module, x: Tensor, target: Tensor, head: Callable) -> tuple[Batch, dict[str, Tensor]]:
    """(z of the ordinary net and lambda = -dL/dz, gradients of L in the parameters), L summed over the samples."""
    *values, output = fed_forward(net, x)
    parameters = dict(net.named_parameters())
    gradients = torch.autograd.grad(head(output, target), [*values, *parameters.values()])
    multiplier = [-gradient for gradient in gradients[: len(values)]]
    of_parameters = dict(zip(parameters, gradients[len(values) :], strict=True))
    return Batch(x, [value.detach() for value in values], target, multiplier), of_parameters


def plain_results(net: nn.Module, batch: Batch, options: Options) -> Results:
    z = [value.detach().requires_grad_() for value in batch.z]
    inputs, energies, residuals = [batch.x, *z], [], []
    for t, layer in enumerate(net.layers):
        prediction = layer(inputs[t])
        if t < len(z):
            multiplier = None if batch.multiplier is None else batch.multiplier[t]
            energies.append(options.energy(z[t], prediction, multiplier))
            residuals.append((z[t] - prediction).detach())
        else:
            energies.append(options.head(prediction, batch.target))
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(torch.stack(energies).sum(), [*z, *parameters.values()])
    of_parameters = dict(zip(parameters, gradients[len(z) :], strict=True))
    return Results([energy.detach() for energy in energies], residuals, list(gradients[: len(z)]), of_parameters)


def plain_visit_(
    net: nn.Module, batch: Batch, options: Options, *, step_size: float, steps: int, dual_step: float
) -> Results:
    """Moves z and multiplier of the batch; returns what the step of the parameters starts from."""

    def step_of_multiplier() -> None:
        for lambda_, e in zip(batch.multiplier or [], plain_results(net, batch, options).residuals, strict=False):
            lambda_.add_(e, alpha=dual_step)

    for k in range(steps):
        if k > 0:
            step_of_multiplier()
        for value, gradient in zip(batch.z, plain_results(net, batch, options).of_z, strict=True):
            value.sub_(gradient, alpha=step_size)
    if steps > 0:
        step_of_multiplier()
    return plain_results(net, batch, options)


def in_float64(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def assert_close(got: Tensor, expected: Tensor, plain: Tensor, what: str, scale: Tensor | None = None) -> None:
    """`got` is `expected` (float64), about as well as `plain` is. scale: tensors whose largest element says how large
    the terms were; by default that of expected."""
    largest = array(expected if scale is None else scale)
    magnitude = abs(largest).max(initial=0)
    assert_accurate(got.detach(), array(expected), array(plain), magnitude, got.dtype, what)
