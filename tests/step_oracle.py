"""One visit of a minibatch by layer-wise gradient decoupling, straight from the equations: in extended precision, and
in plain PyTorch with autograd, whose own error sets the tolerance. It knows nothing of lgd_kernels.

Indices are those of the equations: layer t = 0 .. T-1 makes zhat_(t+1) from z_t, and z_0 is x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from layer_oracle import EXACT, PLAIN, plain_linear
from oracle import EXTENDED, Array, array, softmax_infogain
from tolerance import accumulation_dtype
from torch import Tensor, nn

Values = Any  # Array or Tensor
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim's own


@dataclass
class State:
    """Everything that a visit reads and writes, layer by layer."""

    x: Values
    z: list[Values]
    weight: list[Values]
    bias: list[Values] | None
    target: Values
    multiplier: list[Values] | None = None
    velocity: list[Values] | None = None
    buffers: dict[str, list[tuple[Values, Values]]] | None = None  # of the optimizer, by "weight" and "bias"
    visits: int = 0

    def converted(self, convert: Callable[[Tensor], Values]) -> State:
        def of(value):
            return None if value is None else [convert(v) for v in value]

        lists = {name: of(getattr(self, name)) for name in ("z", "weight", "bias", "multiplier", "velocity")}
        return replace(self, x=convert(self.x), target=convert(self.target), **lists)

    def exact(self) -> State:
        return self.converted(array)

    def plain(self) -> State:
        """In the accumulation type of x; labels stay what they are."""
        dtype = accumulation_dtype(self.x.dtype)
        return self.converted(lambda v: v.detach().to(dtype if v.is_floating_point() else torch.int64, copy=True))


@dataclass
class Options:
    """One entry per layer in every list; H is a dense matrix. operands: what phi(z), W and m are rounded to for the
    products and for the gradient of the bias, in the exact judgement; None for not at all."""

    step_size: float
    steps: int
    dual_step: float
    z_momentum: float
    squared: bool
    H: Tensor
    ignore_index: int
    activation: list[str]
    preactivation: bool
    hidden_loss: str
    kappa: float
    rho: list[float]
    skip: list[float]
    branch_scale: list[float]
    operands: torch.dtype | None = None

    def as_operand(self, values: Array) -> Array:
        if self.operands is None:
            return values
        return array(torch.from_numpy(values.astype(np.float64)).to(self.operands))

    def phi(self, t: int) -> str:
        return self.activation[t] if self.preactivation else "identity"

    def f(self, t: int) -> str:
        return "identity" if self.preactivation else self.activation[t]


def spelled_out(
    T: int,
    n_outputs: int,
    *,
    step_size: float,
    steps: int = 1,
    dual_step: float | None = None,
    z_momentum: float = 0.0,
    head: str = "softmax_infogain",
    H: Tensor | None = None,
    ignore_index: int = -100,
    activation: str | Sequence[str] = "tanh",
    preactivation: bool = False,
    hidden_loss: str = "squared",
    kappa: float = 1.0,
    rho: float | Sequence[float] = 1.0,
    skip: float | Sequence[float] = 0.0,
    branch_scale: float | Sequence[float] = 1.0,
    operands: torch.dtype | None = None,
) -> Options:
    """The options of decoupled_step_, with its defaults."""
    if isinstance(activation, str):
        activation = [activation] * T
        activation[0 if preactivation else -1] = "identity"
    if not isinstance(skip, Sequence):
        skip = [0.0 if t in (0, T - 1) else skip for t in range(T)]
    rho = list(rho) if isinstance(rho, Sequence) else [rho] * (T - 1)
    return Options(
        step_size=step_size,
        steps=steps,
        dual_step=0.5 * min(rho, default=0.0) if dual_step is None else dual_step,
        z_momentum=z_momentum,
        squared=head == "squared",
        H=torch.eye(n_outputs, dtype=torch.float64) if H is None else H,
        ignore_index=ignore_index,
        activation=list(activation),
        preactivation=preactivation,
        hidden_loss=hidden_loss,
        kappa=kappa,
        rho=rho,
        skip=list(skip),
        branch_scale=list(branch_scale) if isinstance(branch_scale, Sequence) else [branch_scale] * T,
        operands=operands,
    )


@dataclass
class Judgement:
    """The energies E_t of the layers at one state; e_1 .. e_(T-1); the gradients of their sum."""

    energies: list[Values]
    e: list[Values]
    of_z: list[Values]
    of_weight: list[Values]
    of_bias: list[Values]


# ---------------------------------------------------------------------------------------------------------------------
# In extended precision, by the formulas for the gradients
# ---------------------------------------------------------------------------------------------------------------------


def _hidden_loss(e: Array, o: Options) -> tuple[Array, Array]:
    """(L_h, its derivative)."""
    if o.hidden_loss == "squared":
        return e**2 / 2, e
    large = np.abs(e) > o.kappa
    loss = np.where(large, o.kappa * (np.abs(e) - EXTENDED(o.kappa) / 2), e**2 / 2)
    return loss, np.clip(e, -o.kappa, o.kappa)


def _exact_head(target: Array, zhat: Array, o: Options) -> tuple[Array, Array]:
    """(L summed over the samples, q_T = -dL/dzhat_T)."""
    if o.squared:
        return ((target - zhat) ** 2 / 2).sum(), target - zhat
    rows = softmax_infogain(zhat, target, array(o.H), ignore_index=o.ignore_index)
    return rows.loss.sum(), -rows.grad


def exact_judgement(s: State, o: Options) -> Judgement:
    T, z = len(s.weight), [s.x, *s.z]
    energies, e, q, m, phi_z = [], [None], [None], [None], []
    weight = [o.as_operand(w) for w in s.weight]
    for t in range(T):
        phi_z.append(o.as_operand(EXACT[o.phi(t)][0](z[t])))
        a = o.branch_scale[t] * phi_z[t] @ weight[t].T + (0 if s.bias is None else s.bias[t])
        zhat = o.skip[t] * z[t] + EXACT[o.f(t)][0](a) if o.skip[t] else EXACT[o.f(t)][0](a)
        if t == T - 1:
            energy, q_above = _exact_head(s.target, zhat, o)
        else:
            e.append(z[t + 1] - zhat)
            lambda_ = 0 if s.multiplier is None else s.multiplier[t]
            loss, pull = _hidden_loss(e[-1], o)
            energy, q_above = (o.rho[t] * loss + lambda_ * e[-1]).sum(), o.rho[t] * pull + lambda_
        energies.append(energy)
        q.append(q_above)
        m.append(o.as_operand(q_above * EXACT[o.f(t)][1](a)))

    def of_z(t: int) -> Array:
        by_branch = o.branch_scale[t] * EXACT[o.phi(t)][1](z[t]) * (m[t + 1] @ weight[t])
        return q[t] - by_branch - (o.skip[t] * q[t + 1] if o.skip[t] else 0)

    return Judgement(
        energies,
        e[1:],
        [of_z(t) for t in range(1, T)],
        [-o.branch_scale[t] * m[t + 1].T @ phi_z[t] for t in range(T)],
        [-m[t + 1].sum(0) for t in range(T)],
    )


# ---------------------------------------------------------------------------------------------------------------------
# In plain PyTorch, by autograd
# ---------------------------------------------------------------------------------------------------------------------


def _plain_head(target: Tensor, z: Tensor, weight: Tensor, bias: Tensor, t: int, o: Options) -> Tensor:
    shared = {"activation": o.activation[t], "preactivation": o.preactivation, "kappa": 1.0, "rho": 1.0}
    if o.squared:
        numbers = {"skip": o.skip[t], "branch_scale": o.branch_scale[t], "hidden_loss": "squared"}
        return plain_linear(z, weight, bias, target, None, **shared, **numbers)
    logits = o.branch_scale[t] * nn.functional.linear(PLAIN[o.phi(t)](z), weight) + bias
    logits = logits + o.skip[t] * z if o.skip[t] else logits
    kept = target != o.ignore_index
    rows = o.H.to(logits.dtype)[torch.where(kept, target, 0)]
    return -torch.where(kept[:, None], rows * torch.log_softmax(logits, 1), 0).sum()


def plain_judgement(s: State, o: Options) -> Judgement:
    T = len(s.weight)
    z, weight = ([v.detach().requires_grad_() for v in values] for values in (s.z, s.weight))
    bias = [v.new_zeros(len(v)) for v in weight] if s.bias is None else s.bias
    bias = [v.detach().requires_grad_() for v in bias]
    inputs, energies, e = [s.x, *z], [], []
    for t in range(T - 1):
        named = {"activation": o.activation[t], "preactivation": o.preactivation}
        numbers = {"kappa": o.kappa, "rho": o.rho[t], "skip": o.skip[t], "branch_scale": o.branch_scale[t]}
        lambda_ = None if s.multiplier is None else s.multiplier[t]
        layer = (inputs[t], weight[t], bias[t], z[t], lambda_)
        energies.append(plain_linear(*layer, **named, **numbers, hidden_loss=o.hidden_loss))
        with torch.no_grad():
            a = o.branch_scale[t] * nn.functional.linear(PLAIN[o.phi(t)](inputs[t]), weight[t]) + bias[t]
            e.append(z[t] - PLAIN[o.f(t)](a) - (o.skip[t] * inputs[t] if o.skip[t] else 0))
    energies.append(_plain_head(s.target, inputs[-1], weight[-1], bias[-1], T - 1, o))
    gradients = torch.autograd.grad(torch.stack(energies).sum(), (*z, *weight, *bias))
    of_z, of_weight, of_bias = gradients[: T - 1], gradients[T - 1 : 2 * T - 1], gradients[2 * T - 1 :]
    return Judgement([v.detach() for v in energies], e, list(of_z), list(of_weight), list(of_bias))


# ---------------------------------------------------------------------------------------------------------------------
# The visit
# ---------------------------------------------------------------------------------------------------------------------


def visit_(judge: Callable, s: State, o: Options, keep: Callable[[Values], Values] = lambda v: v) -> Judgement:
    """Moves the hidden values and multipliers of s; returns what the step of the parameters starts from. `keep` rounds
    what is stored."""

    def step_of_multiplier() -> None:
        if s.multiplier is not None:
            e = judge(s, o).e
            s.multiplier = [keep(v + o.dual_step * e_t) for v, e_t in zip(s.multiplier, e, strict=True)]

    for k in range(o.steps):
        if k > 0:
            step_of_multiplier()
        along = judge(s, o).of_z
        if s.velocity is not None:
            along = s.velocity = [keep(o.z_momentum * v + g) for v, g in zip(s.velocity, along, strict=True)]
        s.z = [keep(z - o.step_size * v) for z, v in zip(s.z, along, strict=True)]
    if o.steps > 0:
        step_of_multiplier()
    return judge(s, o)


def mean_gradients(judged: Judgement, n: int) -> dict[str, list[Values]]:
    return {"weight": [g / n for g in judged.of_weight], "bias": [g / n for g in judged.of_bias]}


def _updated(rule: str, w: Values, g: Values, first: Values, second: Values, visit: int, lr: float, decay: float):
    """(w, first, second) after torch.optim's step number `visit`."""
    if rule == "adamw":
        w, decay = w * (1 - lr * decay), 0.0
    g = g + decay * w
    if rule == "sgd":
        return w - lr * g, first, second
    if rule == "momentum":
        first = BETAS[0] * first + g
        return w - lr * first, first, second
    first, second = (beta * v + (1 - beta) * h for beta, v, h in zip(BETAS, (first, second), (g, g * g), strict=True))
    unbiased, spread = first / (1 - BETAS[0] ** visit), second / (1 - BETAS[1] ** visit)
    return w - lr * unbiased / (spread**0.5 + EPSILON), first, second


def step_of_parameters_(rule: str, s: State, gradients: dict[str, list[Values]], lr: float, decay: float) -> None:
    """One step of SGD ("sgd", or "momentum" 0.9), "adam" or "adamw"."""
    s.visits += 1
    given = {name: getattr(s, name) for name in ("weight", "bias") if getattr(s, name) is not None}
    if s.buffers is None:
        s.buffers = {name: [(0 * w, 0 * w) for w in values] for name, values in given.items()}
    for name, values in given.items():
        after = [
            _updated(rule, w, g, *buffers, s.visits, lr, decay)
            for w, g, buffers in zip(values, gradients[name], s.buffers[name], strict=True)
        ]
        setattr(s, name, [w for w, _, _ in after])
        s.buffers[name] = [(first, second) for _, first, second in after]
