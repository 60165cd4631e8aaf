"""One step of training of a deep tanh net with squared error and SGD with momentum, for every peer alike.

    z_0 = x,  zhat_(t+1) = tanh(z_t W_t^T + b_t), without tanh in the last layer,  L = |y - zhat_T|^2 / 2

Backpropagation goes through all layers in turn. A decoupled step has z_1 .. z_(T-1) given: it moves them once, by
step_size times the gradient of sum_t |z_t - zhat_t|^2 / 2 + L, and then the weights by that at the new z.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

import lgd_kernels as lgd
from bench.peers import Expected, Outputs, Problem, compiled
from bench.workloads import SHALLOW, DecoupledStepWorkload

STEP_SIZE, LR, MOMENTUM = 0.01, 1e-3, 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What a peer trains; every peer has its own, and all start alike."""

    x: Tensor  # (n, d)
    y: Tensor  # (n, d)
    z: Tensor  # (T - 1, n, d)
    weight: Tensor  # (T, d, d), float32
    bias: Tensor  # (T, d), float32
    momentum: list[Tensor] = field(default_factory=list)  # of weight and bias, once there is one


def make_state(workload: DecoupledStepWorkload) -> State:
    """Random data and parameters; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    T, n, d = workload.depth, workload.n_samples, workload.width
    x, y = torch.randn(2, n, d, generator=generator)
    z, weight = torch.randn(T - 1, n, d, generator=generator), torch.randn(T, d, d, generator=generator) / d**0.5
    dtype = getattr(torch, workload.dtype)
    return State(x.to(dtype), y.to(dtype), z.to(dtype), weight, torch.zeros(T, d))


# ---------------------------------------------------------------------------------------------------------------------
# Backpropagation
# ---------------------------------------------------------------------------------------------------------------------


def feed_forward_loss(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
    """The mean loss, for the weights of all layers and then their biases."""
    T, h = len(parameters) // 2, x
    for t in range(T):
        h = functional.linear(h, parameters[t].to(x.dtype), parameters[T + t].to(x.dtype))
        h = torch.tanh(h) if t < T - 1 else h
    return 0.5 * (y - h).float().square().sum() / len(x)


def backpropagation(state: State, loss_of: Callable[..., Tensor]) -> Callable[[], Outputs]:
    """A step of torch.optim.SGD, fused, as fast as it gets on a CPU."""
    parameters = [p.clone().requires_grad_() for p in (*state.weight, *state.bias)]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, fused=True)

    def gradients() -> Tensor:
        return torch.stack([optimizer.state[p]["momentum_buffer"] for p in parameters[: len(state.weight)]])

    def step() -> Outputs:
        optimizer.zero_grad()
        loss_of(state.x, state.y, *parameters).backward()
        optimizer.step()
        return {"backpropagated": gradients}

    return step


def batched_backpropagation(state: State) -> Callable[[], Outputs]:
    """By hand: the errors in turn, and then the gradients of all weights in one bmm."""
    T, n, dtype = len(state.weight), len(state.x), state.x.dtype
    weight, bias = state.weight.clone(), state.bias.clone()
    momentum, momentum_of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    inputs, deltas = (torch.empty(T, *state.x.shape, dtype=dtype) for _ in range(2))
    inputs[0] = state.x

    def step() -> Outputs:
        narrow, narrow_bias = weight.to(dtype), bias.to(dtype)
        for t in range(T - 1):
            torch.tanh(functional.linear(inputs[t], narrow[t], narrow_bias[t]), out=inputs[t + 1])
        torch.sub(functional.linear(inputs[-1], narrow[-1], narrow_bias[-1]), state.y, out=deltas[-1])
        for t in reversed(range(1, T)):
            torch.mul(deltas[t] @ narrow[t], 1 - inputs[t] * inputs[t], out=deltas[t - 1])
        momentum.mul_(MOMENTUM).add_(torch.bmm(deltas.transpose(1, 2), inputs), alpha=1 / n)
        momentum_of_bias.mul_(MOMENTUM).add_(deltas.sum(1), alpha=1 / n)
        weight.sub_(momentum, alpha=LR)
        bias.sub_(momentum_of_bias, alpha=LR)
        return {"backpropagated": momentum}

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The same decoupled step with bmm
# ---------------------------------------------------------------------------------------------------------------------


def judge(x: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the layers' inputs, e, delta), each (T, n, d)."""
    inputs = torch.cat([x[None], z])
    a = torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2))
    f = torch.cat([torch.tanh(a[:-1]), a[-1:]])
    e = torch.cat([z, y[None]]) - f
    return inputs, e, -torch.cat([e[:-1] * (1 - f[:-1] * f[:-1]), e[-1:]])


def step_with_bmm(x, y, z, weight, bias, momentum, momentum_of_bias):
    """The new z, weight, bias and momenta."""
    narrow, narrow_bias = weight.to(x.dtype), bias.to(x.dtype)
    _, e, delta = judge(x, y, z, narrow, narrow_bias)
    z = z - STEP_SIZE * (e[:-1] + torch.bmm(delta[1:], narrow[1:]))
    inputs, _, delta = judge(x, y, z, narrow, narrow_bias)
    momentum = MOMENTUM * momentum + torch.bmm(delta.transpose(1, 2), inputs) / x.shape[0]
    momentum_of_bias = MOMENTUM * momentum_of_bias + delta.sum(1) / x.shape[0]
    return z, weight - LR * momentum, bias - LR * momentum_of_bias, momentum, momentum_of_bias


def decoupled_with_bmm(state: State, step_of: Callable) -> Callable[[], Outputs]:
    changing = [state.z, state.weight, state.bias, torch.zeros_like(state.weight), torch.zeros_like(state.bias)]

    def step() -> Outputs:
        with torch.no_grad():
            changing[:] = step_of(state.x, state.y, *changing)
        return {"z": changing[0], "momentum": changing[3]}

    return step


# ---------------------------------------------------------------------------------------------------------------------
# lgd_kernels, and all peers
# ---------------------------------------------------------------------------------------------------------------------


def decoupled_by_us(state: State) -> Callable[[], Outputs]:
    optimizer = torch.optim.SGD([state.weight, state.bias], lr=LR, momentum=MOMENTUM)
    options = {"head": "squared", "step_size": STEP_SIZE, "optimizer": optimizer}

    def step() -> Outputs:
        lgd.decoupled_step_(state.x, state.z, state.weight, state.bias, state.y, **options)
        return {"z": state.z, "momentum": optimizer.state[state.weight]["momentum_buffer"]}

    return step


def shallow_by_us(workload: DecoupledStepWorkload) -> Callable[[], Outputs]:
    """The same number of products with fewer layers and more samples; checked as a workload of its own."""
    n_samples = workload.depth * workload.n_samples // SHALLOW
    shallow = DecoupledStepWorkload(SHALLOW, workload.width, n_samples, workload.dtype)
    step = decoupled_by_us(make_state(shallow))

    def without_outputs() -> Outputs:
        step()
        return {}

    return without_outputs


def _copy(destination: Tensor, source: Tensor) -> Outputs:
    return {"copy": destination.copy_(source)}


def _call(peer: str, workload: DecoupledStepWorkload) -> Callable[[], Outputs]:
    state = make_state(workload)
    calls = {
        "copy": lambda: functools.partial(_copy, torch.zeros_like(state.z), state.z),
        "eager": lambda: backpropagation(state, feed_forward_loss),
        "compiled": lambda: backpropagation(state, compiled(feed_forward_loss)),
        "batched": lambda: batched_backpropagation(state),
        "bmm": lambda: decoupled_with_bmm(state, step_with_bmm),
        "bmm_compiled": lambda: decoupled_with_bmm(state, compiled(step_with_bmm)),
        "shallow": lambda: shallow_by_us(workload),
        "ours": lambda: decoupled_by_us(state),
    }
    if peer not in calls:
        raise ValueError(f"peers: unknown peer {peer!r}")
    return calls[peer]()


def prepare(workload: DecoupledStepWorkload) -> Problem:
    """The peers of a workload, each with data of its own."""
    torch.compiler.reset()  # a function compiled for another size would be compiled again for any size
    T, n, d = workload.depth, workload.n_samples, workload.width
    state = make_state(workload)
    return Problem(
        calls={peer: _call(peer, workload) for peer in workload.peers},
        before_each_call=lambda: None,  # z and the weights go on from where they are, as in training
        expected=lambda: expected_outputs(workload),
        copied_bytes=2 * state.z.nbytes,
        least_bytes=2 * (state.z.nbytes + 2 * state.weight.nbytes),  # z, weight and momentum, read and written
        flops=4 * T * 2 * n * d * d,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The right outputs
# ---------------------------------------------------------------------------------------------------------------------


def expected_outputs(workload: DecoupledStepWorkload) -> dict[str, Expected]:
    """In float64: the momenta after one step, which are the gradients of the weights, and z after one step.

    Errors are relative to the largest gradient of each kind, that of z to its largest change.
    """
    state = make_state(workload)
    x, y, z, weight, bias = (tensor.double() for tensor in (state.x, state.y, state.z, state.weight, state.bias))
    rounding = max(torch.finfo(state.x.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = rounding * workload.depth * workload.width**0.5

    _, e, delta = judge(x, y, z, weight, bias)
    gradient_of_z = e[:-1] + delta[1:] @ weight[1:]
    moved = z - STEP_SIZE * gradient_of_z
    inputs, _, delta = judge(x, y, moved, weight, bias)
    momentum = delta.transpose(1, 2) @ inputs / len(x)

    parameters = [p.requires_grad_() for p in (*weight.unbind(), *bias.unbind())]
    loss = feed_forward_loss_in_float64(x, y, parameters)
    backpropagated = torch.stack(torch.autograd.grad(loss, parameters[: len(weight)]))
    of_z = torch.full_like(moved, STEP_SIZE * float(gradient_of_z.abs().max()))
    z_rounding = rounding * float(moved.abs().max()) / float(of_z.max()) if len(moved) else 0.0

    def against_largest(value: Tensor) -> Expected:
        return Expected(value, torch.full_like(value, float(value.abs().max())), tolerance)

    return {
        "copy": Expected(z, torch.ones_like(z), 0.0),
        "z": Expected(moved, of_z, tolerance + z_rounding),
        "momentum": against_largest(momentum),
        "backpropagated": against_largest(backpropagated),
    }


def feed_forward_loss_in_float64(x: Tensor, y: Tensor, parameters: list[Tensor]) -> Tensor:
    T, h = len(parameters) // 2, x
    for t in range(T):
        h = h @ parameters[t].t() + parameters[T + t]
        h = h.tanh() if t < T - 1 else h
    return 0.5 * (y - h).square().sum() / len(x)
