"""One step of training of a deep tanh net with squared error and SGD with momentum, for every peer alike.

    z_0 = x,  zhat_(t+1) = tanh(z_t W_t^T + b_t), without tanh in the last layer,  L = |y - zhat_T|^2 / 2

Backpropagation goes through all layers in turn. A decoupled step has z_1 .. z_(T-1) given: it moves them once, by
step_size times the gradient of sum_t |z_t - zhat_t|^2 / 2 + L, and then the weights by that at the new z.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import lgd_kernels as lgd
from bench.peers import Expected, Outputs, Problem, compiled
from bench.workloads import SHALLOW, DecoupledStepWorkload
from lgd_kernels import backends, reference

STEP_SIZE, LR, MOMENTUM = 0.1, 1e-2, 0.9
CHECKED_CALLS = 2  # the first one alone would not show a momentum that is left out


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


def make_state(workload: DecoupledStepWorkload) -> State:
    """Random data and parameters; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    T, n, d = workload.depth, workload.n_samples, workload.width
    x, y = torch.randn(2, n, d, generator=generator)
    z, weight = torch.randn(T - 1, n, d, generator=generator), torch.randn(T, d, d, generator=generator) / d**0.5
    samples = (tensor.to(workload.device, getattr(torch, workload.dtype)) for tensor in (x, y, z))
    return State(*samples, weight.to(workload.device), torch.zeros(T, d, device=workload.device))


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
    """A step of torch.optim.SGD, fused, which is the fastest."""
    parameters = [p.clone().requires_grad_() for p in (*state.weight, *state.bias)]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, fused=True)

    T = len(state.weight)
    outputs = {
        "weight_by_backpropagation": lambda: torch.stack([p.detach() for p in parameters[:T]]),
        "bias_by_backpropagation": lambda: torch.stack([p.detach() for p in parameters[T:]]),
    }

    def step() -> Outputs:
        optimizer.zero_grad()
        loss_of(state.x, state.y, *parameters).backward()
        optimizer.step()
        return outputs

    return step


def batched_backpropagation(state: State) -> Callable[[], Outputs]:
    """By hand: the errors in turn, and then the gradients of all weights in one bmm."""
    T, n, dtype = len(state.weight), len(state.x), state.x.dtype
    weight, bias = state.weight.clone(), state.bias.clone()
    momentum, momentum_of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    inputs, deltas = (state.x.new_empty(T, *state.x.shape) for _ in range(2))
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
        return {"weight_by_backpropagation": weight, "bias_by_backpropagation": bias}

    return step


# ---------------------------------------------------------------------------------------------------------------------
# The same decoupled step with bmm
# ---------------------------------------------------------------------------------------------------------------------


def judge(nodes: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(e, delta), each (T, n, d), for nodes (T + 1, n, d): x, the hidden values, and y."""
    f = torch.baddbmm(bias.unsqueeze(1), nodes[:-1], weight.transpose(1, 2))
    f[:-1].tanh_()
    e = nodes[1:] - f
    delta = -e
    delta[:-1] *= 1 - f[:-1] * f[:-1]
    return e, delta


def step_with_bmm_(nodes, weight, bias, momentum, momentum_of_bias) -> None:
    """Moves everything in place, but the first and the last of the nodes."""
    narrow, narrow_bias = weight.to(nodes.dtype), bias.to(nodes.dtype)
    e, delta = judge(nodes, narrow, narrow_bias)
    nodes[1:-1] -= STEP_SIZE * (e[:-1] + torch.bmm(delta[1:], narrow[1:]))
    _, delta = judge(nodes, narrow, narrow_bias)
    momentum.mul_(MOMENTUM).add_(torch.bmm(delta.transpose(1, 2), nodes[:-1]), alpha=1 / nodes.shape[1])
    momentum_of_bias.mul_(MOMENTUM).add_(delta.sum(1), alpha=1 / nodes.shape[1])
    weight.sub_(momentum, alpha=LR)
    bias.sub_(momentum_of_bias, alpha=LR)


def decoupled_with_bmm(state: State, step_of: Callable) -> Callable[[], Outputs]:
    nodes = torch.cat([state.x[None], state.z, state.y[None]])
    weight, bias = state.weight.clone(), state.bias.clone()
    momentum, momentum_of_bias = torch.zeros_like(weight), torch.zeros_like(bias)

    def step() -> Outputs:
        with torch.no_grad():
            step_of(nodes, weight, bias, momentum, momentum_of_bias)
        return {"z": nodes[1:-1], "weight": weight, "bias": bias}

    return step


# ---------------------------------------------------------------------------------------------------------------------
# lgd_kernels, and all peers
# ---------------------------------------------------------------------------------------------------------------------


def decoupled_by_us(state: State, backend: str = "auto") -> Callable[[], Outputs]:
    optimizer = torch.optim.SGD([state.weight, state.bias], lr=LR, momentum=MOMENTUM)
    options = {"head": "squared", "step_size": STEP_SIZE, "optimizer": optimizer}
    visit = lgd.capture_step(state.x, state.z, state.weight, state.bias, state.y, **options)

    def step() -> Outputs:
        with backends.force(backend):
            visit()
        return {"z": state.z, "weight": state.weight, "bias": state.bias}

    return step


def shallow_by_us(workload: DecoupledStepWorkload) -> Callable[[], Outputs]:
    """The same number of products with fewer layers and more samples; checked as a workload of its own."""
    n_samples = workload.depth * workload.n_samples // SHALLOW
    shallow = DecoupledStepWorkload(SHALLOW, workload.width, n_samples, workload.dtype, device=workload.device)
    step = decoupled_by_us(make_state(shallow))

    def without_outputs() -> Outputs:
        step()
        return {}

    return without_outputs


def _copy(destination: Tensor, source: Tensor) -> Outputs:
    return {"copy": destination.copy_(source)}


def _call(peer: str, workload: DecoupledStepWorkload) -> Callable[[], Outputs]:
    state, device = make_state(workload), workload.device
    calls = {
        "copy": lambda: functools.partial(_copy, torch.zeros_like(state.z), state.z),
        "eager": lambda: backpropagation(state, feed_forward_loss),
        "eager_graph": lambda: as_graph(backpropagation(state, feed_forward_loss), device),
        "compiled": lambda: as_graph(backpropagation(state, compiled(feed_forward_loss, device)), device),
        "batched": lambda: as_graph(batched_backpropagation(state), device),
        "bmm": lambda: as_graph(decoupled_with_bmm(state, step_with_bmm_), device),
        "bmm_compiled": lambda: as_graph(decoupled_with_bmm(state, compiled(step_with_bmm_, device)), device),
        "shallow": lambda: shallow_by_us(workload),
        "cuda": lambda: decoupled_by_us(state, "cuda"),
        "triton": lambda: decoupled_by_us(state, "triton"),
        "ours": lambda: decoupled_by_us(state),
    }
    if peer not in calls:
        raise ValueError(f"peers: unknown peer {peer!r}")
    return calls[peer]()


def as_graph(step: Callable[[], Outputs], device: str) -> Callable[[], Outputs]:
    """The step; on a GPU, once its results have been checked, as a CUDA graph, so that no kernel waits for the host."""
    return Graph(step) if device == "cuda" else step


class Graph:
    """A step that is captured once it has run often enough to have allocated and compiled what it needs."""

    def __init__(self, step: Callable[[], Outputs]):
        self._step, self._calls, self._graph = step, 0, None
        self._stream = torch.cuda.Stream()  # what autograd allocates must not belong to the stream that is not captured

    def __call__(self) -> Outputs:
        self._calls += 1
        if self._calls <= CHECKED_CALLS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                outputs = self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            return outputs
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._outputs = self._step()
        self._graph.replay()
        return self._outputs


def prepare(workload: DecoupledStepWorkload) -> Problem:
    """The peers of a workload, each with data of its own."""
    torch.compiler.reset()  # a function compiled for another size would be compiled again for any size
    T, n, d = workload.depth, workload.n_samples, workload.width
    state = make_state(workload)
    return Problem(
        calls={peer: _call(peer, workload) for peer in workload.peers if _is_here(peer)},
        before_each_call=lambda: None,  # z and the weights go on from where they are, as in training
        expected=lambda: expected_outputs(workload),
        copied_bytes=2 * state.z.nbytes,
        least_bytes=2 * (state.z.nbytes + 2 * state.weight.nbytes),  # z, weight and momentum, read and written
        flops=(4 * T - 1) * 2 * n * d * d,  # the input of the first layer has no gradient
        checked_calls=CHECKED_CALLS,
        device=workload.device,
    )


def _is_here(peer: str) -> bool:
    """Whether this machine has a backend of that name with the op; other peers are everywhere."""
    if peer not in ("cuda", "triton"):
        return True
    with contextlib.suppress(RuntimeError), backends.force(peer):
        return backends.implementation("decoupled_step_", "cuda") is not reference
    return False


# ---------------------------------------------------------------------------------------------------------------------
# The right outputs
# ---------------------------------------------------------------------------------------------------------------------


def expected_outputs(workload: DecoupledStepWorkload) -> dict[str, Expected]:
    """In float64: z and the parameters after CHECKED_CALLS steps. Errors are relative to the largest change."""
    state = make_state(workload)
    nodes = torch.cat([state.x[None], state.z, state.y[None]]).double()
    parameters = [state.weight.double(), state.bias.double()]
    by_backpropagation = [p.clone() for p in parameters]
    for of, step in (
        (parameters, functools.partial(_decoupled_gradients_, nodes)),
        (by_backpropagation, functools.partial(_gradients, state)),
    ):
        momenta = [torch.zeros_like(p) for p in of]
        for _ in range(CHECKED_CALLS):
            for p, momentum, gradient in zip(of, momenta, step(*of), strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                p.sub_(momentum, alpha=LR)

    eps = torch.finfo(state.x.dtype).eps
    tolerance = min(eps * workload.depth * workload.width**0.5, 0.05)

    def expected(before: Tensor, after: Tensor) -> Expected:
        change = float((after - before.double()).abs().max())
        rounding = torch.finfo(before.dtype).eps * float(after.abs().max()) / change if change else 0.0
        return Expected(after, torch.full_like(after, change), tolerance + CHECKED_CALLS * rounding)

    return {
        "copy": Expected(state.z.double(), torch.ones_like(nodes[1:-1]), 0.0),
        "z": expected(state.z, nodes[1:-1]),
        "weight": expected(state.weight, parameters[0]),
        "bias": expected(state.bias, parameters[1]),
        "weight_by_backpropagation": expected(state.weight, by_backpropagation[0]),
        "bias_by_backpropagation": expected(state.bias, by_backpropagation[1]),
    }


def _decoupled_gradients_(nodes: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Those of weight and bias, layer by layer from the equations, once z has moved."""
    T, n = len(weight), nodes.shape[1]

    def layer(t: int) -> tuple[Tensor, Tensor]:
        a = nodes[t] @ weight[t].t() + bias[t]
        slope = 1 / a.cosh() ** 2 if t < T - 1 else torch.ones_like(a)
        e = nodes[t + 1] - (a.tanh() if t < T - 1 else a)
        return e, -e * slope

    layers = [layer(t) for t in range(T)]
    for t in range(1, T):
        nodes[t] -= STEP_SIZE * (layers[t - 1][0] + layers[t][1] @ weight[t])
    deltas = [layer(t)[1] for t in range(T)]
    return (
        torch.stack([delta.t() @ z for delta, z in zip(deltas, nodes[:-1], strict=True)]) / n,
        torch.stack([delta.sum(0) for delta in deltas]) / n,
    )


def _gradients(state: State, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the mean loss, by autograd."""
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    h = state.x.double()
    for t in range(len(weight)):
        h = h @ weight[t].t() + bias[t]
        h = h.tanh() if t < len(weight) - 1 else h
    return torch.autograd.grad(0.5 * (state.y.double() - h).square().sum() / len(h), (weight, bias))
