"""One visit of a minibatch: a few steps of its hidden values and multipliers, then the gradients of the weights.

The energy of a sample is E = L(logits, label) + sum over t = 1 .. depth of rho e_t^2 / 2 + <lambda_t, e_t>, where
e_t = z_t - (what the layer below makes of z_(t-1)), and L is the softmax-with-infogain loss. All layers move at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels import ops
from lgd_kernels.decoupled.residual_net import Judgement, ResidualNet
from lgd_kernels.infogain import Infogain


class Batch(NamedTuple):
    """The given ends of the net for n samples."""

    x: Tensor  # (n, n_inputs)
    labels: Tensor  # (n,) int64
    H: Infogain


class Sweep(NamedTuple):
    """All layers of the net, judged at one z."""

    first: Judgement  # each (1, n, width)
    hidden: Judgement  # each (depth - 1, n, width)
    output_delta: Tensor  # dL/dlogits, (1, n, n_classes)

    def residual(self) -> Tensor:
        """e_1 .. e_depth, (depth, n, width)."""
        return torch.cat([self.first.residual, self.hidden.residual])


def _sweep(net: ResidualNet, batch: Batch, z: Tensor, multiplier: Tensor | None, rho: float, dual_step: float) -> Sweep:
    """Judge all layers at z (depth, n, width), with lambda after its step lambda += dual_step * e."""
    of_first, of_hidden = (None, None) if multiplier is None else (multiplier[:1], multiplier[1:])
    first = net.first.judge(batch.x.unsqueeze(0), z[:1], of_first, rho, dual_step)
    hidden = net.hidden.judge(z[:-1], z[1:], of_hidden, rho, dual_step)
    logits, labels = net.output.forward(z[-1]).unsqueeze(2), batch.labels.unsqueeze(1)
    row_scale = logits.new_ones(labels.shape)
    _, _, delta, _ = ops.softmax_infogain(logits, labels, *batch.H.parts, -100, 0.0, row_scale, False, False)
    return Sweep(first, hidden, delta.squeeze(2).unsqueeze(0))


def _gradient(net: ResidualNet, z: Tensor, sweep: Sweep) -> Tensor:
    """dE/dz (depth, n, width): from the layer that z_t is the target of, and from the one that it is the input of."""
    gradient = torch.cat([sweep.first.q, sweep.hidden.q])
    gradient[:-1] += net.hidden.gradients(z[:-1], sweep.hidden.delta, sweep.hidden.q, of_parameters=False)[0]
    gradient[-1:] += net.output.gradients(z[-1:], sweep.output_delta, sweep.output_delta, of_parameters=False)[0]
    return gradient


@torch.no_grad()
def gradient_of_hidden(net: ResidualNet, batch: Batch, z: Tensor, multiplier: Tensor | None, rho: float) -> Tensor:
    """dE/dz (depth, n, width)."""
    return _gradient(net, z, _sweep(net, batch, z, multiplier, rho, 0.0))


@torch.no_grad()
def visit_(
    net: ResidualNet,
    batch: Batch,
    z: Tensor,
    multiplier: Tensor | None,
    *,
    rho: float,
    steps: int,
    step_size: float,
    dual_step: float,
) -> Tensor:
    """Move z and multiplier in place, then set the .grad of the net's parameters to their mean over the samples.

    `steps` times: judge all layers (and, except in the first, multiplier += dual_step * e), then
    z -= step_size * dE/dz for all layers at once. Then judge once more, with a last step of the multiplier: the
    gradients of the weights are those of this final state. Without a multiplier there is no dual step.

    z, multiplier: (depth, n, width). Returns the final residual e, in the same shape.
    """
    for k in range(steps + 1):
        dual = 0.0 if k == 0 or multiplier is None else dual_step
        sweep = _sweep(net, batch, z, multiplier, rho, dual)
        if dual != 0:
            multiplier.add_(sweep.residual(), alpha=dual)
        if k < steps:
            z.sub_(_gradient(net, z, sweep), alpha=step_size)
    _set_gradients(net, batch, z, sweep)
    return sweep.residual()


def _set_gradients(net: ResidualNet, batch: Batch, z: Tensor, sweep: Sweep) -> None:
    for stack, inputs, delta, q in (
        (net.first, batch.x.unsqueeze(0), sweep.first.delta, sweep.first.q),
        (net.hidden, z[:-1], sweep.hidden.delta, sweep.hidden.q),
        (net.output, z[-1:], sweep.output_delta, sweep.output_delta),
    ):
        _, grad_weight, grad_bias = stack.gradients(inputs, delta, q, of_parameters=True)
        stack.weight.grad, stack.bias.grad = grad_weight / len(batch.x), grad_bias / len(batch.x)
