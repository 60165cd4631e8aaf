"""decoupled_step_ in plain PyTorch: one visit of a minibatch by layer-wise gradient decoupling, in place.

A net of T layers. Lists of tensors are stacks along the layers, in order: weight [(T_i, d_out, d_in)], bias [(T_i,
d_out)], and for the T - 1 hidden values z [(T_i, n, d)]; how a list is cut into stacks does not matter. Lists of
numbers have one entry per layer. x (n, d_0) is the input of the first layer, z_t that of layer t and the target of the
one below. All tensors of samples share a dtype; parameters and buffers have the accumulation type. Optional lists may
be empty. With bfloat16 samples the operands of the products (phi(z), weight and delta) are rounded to it; with float16
they are not. In 16 bits lambda and velocity are rounded before they are used here; a kernel may round them when it
stores them only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lgd_kernels.reference.activations import SQUARED, activate, times_derivative
from lgd_kernels.reference.decoupled_linear import functions_of, layer_logits, product
from lgd_kernels.reference.local_residual import layer_energy, layer_residual
from lgd_kernels.reference.softmax_infogain import accumulation_dtype, softmax_infogain

UPDATE_RULES = ("gradient", "sgd", "momentum", "adam")


class UpdateNumbers(NamedTuple):
    """The numbers of an optimizer's step for one stack of parameters."""

    lr: float = 0.0
    momentum: float = 0.0  # Adam's first beta
    second_momentum: float = 0.0  # Adam's second beta
    epsilon: float = 0.0
    l2: float = 0.0  # decay that is part of the gradient
    decay: float = 1.0  # factor of the parameter before its step
    root: float = 1.0  # what Adam divides sqrt(v) by


def update_(rule: str, u: UpdateNumbers, w: Tensor, first: Tensor | None, second: Tensor | None, g: Tensor) -> None:
    """One step of the optimizer for the parameter w with gradient g, in place and in torch.optim's order.

    gradient    first = g
    sgd         w -= lr (g + l2 w)
    momentum    first = momentum first + g + l2 w,  w -= lr first
    adam        Adam and AdamW: w *= decay, then moments first and second, and w -= lr first / (sqrt(second) / root +
                epsilon), where lr and root hold the corrections of the bias
    """
    if rule == "gradient":
        first.copy_(g)
        return
    if rule == "adam":
        w.mul_(u.decay)
    g = g + u.l2 * w
    if rule == "sgd":
        w.sub_(u.lr * g)
    elif rule == "momentum":
        first.mul_(u.momentum).add_(g)
        w.sub_(u.lr * first)
    else:
        first.lerp_(g, 1 - u.momentum)
        second.mul_(u.second_momentum).addcmul_(g, g, value=1 - u.second_momentum)
        w.sub_(u.lr * (first / (second.sqrt() / u.root + u.epsilon)))


def _layers(stacks: Sequence[Tensor]) -> list[Tensor]:
    return [layer for stack in stacks for layer in stack.unbind(0)]


def decoupled_step_(
    x: Tensor,
    z: list[Tensor],
    multiplier: list[Tensor],
    velocity: list[Tensor],
    residual: list[Tensor],
    weight: list[Tensor],
    weight_first: list[Tensor],
    weight_second: list[Tensor],
    bias: list[Tensor],
    bias_first: list[Tensor],
    bias_second: list[Tensor],
    target: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    squared_error: bool,
    activation: list[int],
    preactivation: bool,
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    branch_scale: list[float],
    steps: int,
    step_size: float,
    z_momentum: float,
    dual_step: float,
    update_rule: int,
    update_numbers: Tensor,
) -> Tensor:
    """Move z and multiplier, then the parameters; returns the energies (T,) that the parameters' step starts from.

    `steps` times, for all layers at once:

        forward     e_t = z_t - zhat_t;  except in the first, lambda_t += dual_step e_t;  q_t = rho L'(e_t) + lambda_t
        velocity_t = z_momentum velocity_t + dE/dz_t;  z_t -= step_size velocity_t

    with dE/dz_t = q_t + (the input gradient of layer t). Then one more forward with its step of lambda (if steps > 0),
    and one step of the optimizer with the mean gradient over the samples at the final z and lambda. Without a velocity
    z_t -= step_size dE/dz_t. With a residual, the final e_t are written there.

    The last layer's loss is softmax_infogain of its raw logits with H = (matrix, background, ...) and labels `target`
    (n,), or with squared_error |target - prediction|^2 / 2 for target (n, d_T). update_rule: a position in
    UPDATE_RULES; update_numbers (stacks, 7) float64: `UpdateNumbers` for every stack of weight, then of bias, on the
    device of x, so that a captured CUDA graph reads those of its next step.
    """
    accumulate = accumulation_dtype(x.dtype)
    operands = x.dtype if x.dtype == torch.bfloat16 else accumulate
    weights = [layer.to(operands) for layer in _layers(weight)]
    n_layers = len(weights)
    biases = _layers(bias) or [None] * n_layers
    hidden, lambdas, velocities = _layers(z), _layers(multiplier), _layers(velocity)
    parts = (matrix, background, diagonal, crow, col, values)

    def judge(t: int, inputs: Tensor, dual: float) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """(energy, e, q, delta) of layer t."""
        phi, f = functions_of(activation[t], preactivation)
        a, is_last = layer_logits(inputs, weights[t], biases[t], phi, branch_scale[t]), t == n_layers - 1
        if is_last and not squared_error:
            ones = torch.ones_like(target, dtype=accumulate).unsqueeze(1)
            rows = (a.unsqueeze(2), target.unsqueeze(1), *parts, ignore_index, 0.0)
            loss, _, delta, _ = softmax_infogain(*rows, ones, False, False)
            return loss.sum(), None, None, delta.squeeze(2).to(operands)
        e = layer_residual(a, (target if is_last else hidden[t]).to(accumulate), inputs, f, skip[t])
        if is_last:
            energy, q = layer_energy(e, None, SQUARED, 1.0, 1.0, 0.0)
        else:
            if lambdas and dual != 0:
                lambdas[t].add_(dual * e)
            lambda_ = lambdas[t].to(accumulate) if lambdas else None
            energy, q = layer_energy(e, lambda_, hidden_loss, kappa, rho[t], 0.0)
        return energy, e, q, times_derivative(f, a, -q).to(operands)

    def forward(k: int) -> tuple[list[Tensor], list]:
        inputs = [value.to(accumulate) for value in (x, *hidden)]
        return inputs, [judge(t, value, dual_step if k > 0 else 0.0) for t, value in enumerate(inputs)]

    for k in range(steps):
        inputs, judged = forward(k)
        gradients = []
        for t in range(1, n_layers):
            _, _, q, delta = judged[t]
            phi, _ = functions_of(activation[t], preactivation)
            of_input = branch_scale[t] * product(delta, weights[t], accumulate)
            gradient = judged[t - 1][2] + times_derivative(phi, inputs[t], of_input)
            gradients.append(gradient if skip[t] == 0 else gradient - skip[t] * q)
        for t, gradient in enumerate(gradients):
            if velocities:
                velocities[t].copy_(z_momentum * velocities[t] + gradient)
                gradient = velocities[t].to(accumulate)
            hidden[t].copy_(hidden[t] - step_size * gradient)

    inputs, judged = forward(steps)
    for of_layer, (_, e, _, _) in zip(_layers(residual), judged, strict=False):
        of_layer.copy_(e)
    per_sample = 1 / len(x) if len(x) else 0.0
    gradients_of_weight, gradients_of_bias = [], []
    for t, (_, _, _, delta) in enumerate(judged):
        phi, _ = functions_of(activation[t], preactivation)
        scale = branch_scale[t] * per_sample
        gradients_of_weight.append(scale * product(delta.t(), activate(phi, inputs[t]).to(operands), accumulate))
        gradients_of_bias.append(per_sample * delta.to(accumulate).sum(0))
    numbers = [UpdateNumbers(*row) for row in update_numbers.tolist()]
    of_weight, of_bias = numbers[: len(weight)], numbers[len(weight) :]
    _update_stacks_(update_rule, of_weight, weight, weight_first, weight_second, gradients_of_weight)
    _update_stacks_(update_rule, of_bias, bias, bias_first, bias_second, gradients_of_bias)
    return torch.stack([energy for energy, _, _, _ in judged])


def _update_stacks_(
    rule: int,
    numbers: list[UpdateNumbers],
    stacks: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    gradients: list[Tensor],
) -> None:
    """`update_` for all layers of a list of stacks."""
    t = 0
    for i, stack in enumerate(stacks):
        gradient = torch.stack(gradients[t : t + len(stack)]) if len(stack) else torch.zeros_like(stack)
        buffers = (first[i] if first else None, second[i] if second else None)
        update_(UPDATE_RULES[rule], numbers[i], stack, *buffers, gradient)
        t += len(stack)
