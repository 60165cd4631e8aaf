"""The gradient of the energy in the hidden values of a minibatch, for all layers at once.

The energy of a sample is E = L(logits, label) + sum over t = 1 .. depth of rho e_t^2 / 2 + <lambda_t, e_t>, where
e_t = z_t - (what the layer below makes of z_(t-1)), and L is the softmax-with-infogain loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lgd_kernels import ops
from lgd_kernels.decoupled.residual_net import Batch, ResidualNet


@torch.no_grad()
def gradient_of_hidden(net: ResidualNet, batch: Batch, z: Tensor, multiplier: Tensor | None, rho: float) -> Tensor:
    """dE/dz (depth, n, width): from the layer that z_t is the target of, and from the one that it is the input of."""
    of_first, of_hidden = (None, None) if multiplier is None else (multiplier[:1], multiplier[1:])
    first = net.first.judge(batch.x.unsqueeze(0), z[:1], of_first, rho)
    hidden = net.hidden.judge(z[:-1], z[1:], of_hidden, rho)
    logits, labels = net.output.forward(z[-1]).unsqueeze(2), batch.labels.unsqueeze(1)
    row_scale = logits.new_ones(labels.shape)
    _, _, delta, _ = ops.softmax_infogain(logits, labels, *batch.H.parts, -100, 0.0, row_scale, False, False)
    delta = delta.squeeze(2).unsqueeze(0)

    gradient = torch.cat([first.q, hidden.q])
    gradient[:-1] += net.hidden.gradient_of_input(z[:-1], hidden.delta, hidden.q)
    gradient[-1:] += net.output.gradient_of_input(z[-1:], delta, delta)
    return gradient
