"""A pre-activation residual net as three stacks of linear layers: the first layer, the hidden ones, the output layer.

    z_1     = s_0 x W_0^T + b_0
    z_(t+1) = z_t + s phi(z_t) W_t^T + b_t          t = 1 .. depth - 1
    logits  = s_T phi(z_depth) W_T^T + b_T

Weights start as N(0, 1) and biases as 0, so that the branch scales s carry the usual fan-in: 1/sqrt(inputs),
1/sqrt(width * depth) and 1/sqrt(width).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lgd_kernels import ops
from lgd_kernels.decoupled.decoupled_step import decoupled_step_
from lgd_kernels.infogain import Infogain
from lgd_kernels.reference.activations import ACTIVATIONS, IDENTITY, SQUARED, activate


class Batch(NamedTuple):
    """The given ends of the net for n samples."""

    x: Tensor  # (n, n_inputs)
    labels: Tensor  # (n,) int64
    H: Infogain


class Judgement(NamedTuple):
    """What a stack says about its inputs and targets; each (T, n, d_out)."""

    delta: Tensor
    q: Tensor


class LinearStack(NamedTuple):
    """T layers of one shape, z -> skip * z + branch_scale * phi(z) W^T + b."""

    weight: Tensor  # (T, d_out, d_in)
    bias: Tensor  # (T, d_out)
    activation: int  # phi, as a position in reference.ACTIVATIONS
    skip: float
    branch_scale: float

    def forward(self, z: Tensor, t: int = 0) -> Tensor:
        """Layer t's output (n, d_out) for z (n, d_in), in plain PyTorch and differentiable."""
        branch = torch.nn.functional.linear(
            self.branch_scale * activate(self.activation, z), self.weight[t], self.bias[t]
        )
        return branch if self.skip == 0 else torch.add(branch, z, alpha=self.skip)

    def judge(self, z: Tensor, target: Tensor, multiplier: Tensor | None, rho: float) -> Judgement:
        """Every layer's delta and q for squared hidden loss; see `reference.decoupled_linear`."""
        T = len(self.weight)
        options = ([self.activation] * T, True, SQUARED, 1.0, [rho] * T, [self.skip] * T, [self.branch_scale] * T)
        tensors = ([z], [self.weight], [self.bias], [target], [multiplier])
        _, _, (delta,), (q,) = ops.decoupled_linear(*tensors, *options, [0.0] * T, [False], [True])
        return Judgement(delta, q)

    def gradient_of_input(self, z: Tensor, delta: Tensor, q: Tensor) -> Tensor:
        """dE/dz (T, n, d_in) from delta (T, n, d_out) and q (read only if skip is not 0)."""
        T = len(self.weight)
        options = ([self.activation] * T, True, [self.skip] * T, [self.branch_scale] * T)
        made = ([q], [delta], [q])  # e is of no use here
        needs = ([True], [False], [False], [False], [False])
        return ops.decoupled_linear_backward([z], [self.weight], *made, None, *options, *needs)[0][0]


class ResidualNet:
    """The net of this module's equations, with hidden values z_1 .. z_depth of one width."""

    def __init__(
        self,
        n_inputs: int,
        width: int,
        depth: int,
        n_classes: int,
        activation: str,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ):
        def stack(T: int, d_in: int, d_out: int, phi: int, skip: float, branch_scale: float) -> LinearStack:
            weight = torch.randn(T, d_out, d_in, generator=generator).to(device).requires_grad_()
            bias = torch.zeros(T, d_out, device=device, requires_grad=True)
            return LinearStack(weight, bias, phi, skip, branch_scale)

        self.activation, phi = activation, ACTIVATIONS.index(activation)
        self.first = stack(1, n_inputs, width, IDENTITY, 0.0, n_inputs**-0.5)
        self.hidden = stack(depth - 1, width, width, phi, 1.0, (width * depth) ** -0.5)
        self.output = stack(1, width, n_classes, phi, 0.0, width**-0.5)

    def parameters(self) -> list[Tensor]:
        return [parameter for stack in (self.first, self.hidden, self.output) for parameter in stack[:2]]

    def hidden_values(self, x: Tensor) -> list[Tensor]:
        """z_1 .. z_depth of the feed-forward pass, each (n, width), for x (n, n_inputs)."""
        values = [self.first.forward(x)]
        for t in range(len(self.hidden.weight)):
            values.append(self.hidden.forward(values[-1], t))
        return values

    def logits(self, x: Tensor) -> Tensor:
        """(n, n_classes) for x (n, n_inputs)."""
        return self.output.forward(self.hidden_values(x)[-1])

    def visit_(
        self, batch: Batch, z: Tensor, multiplier: Tensor | None, optimizer: Optimizer | None, **options
    ) -> tuple[Tensor, Tensor]:
        """`decoupled_step_` for this net: (energies (depth + 1,), final residual (depth, n, width)).

        z and multiplier: (depth, n, width). options: rho, steps, step_size, dual_step.
        """
        stacks = (self.first, self.hidden, self.output)
        return decoupled_step_(
            batch.x,
            z,
            [stack.weight for stack in stacks],
            [stack.bias for stack in stacks],
            batch.labels,
            H=batch.H,
            multiplier=multiplier,
            optimizer=optimizer,
            activation=self.activation,
            preactivation=True,
            skip=1.0,
            branch_scale=[stack.branch_scale for stack in stacks for _ in range(len(stack.weight))],
            return_residual=True,
            **options,
        )
