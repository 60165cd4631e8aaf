"""Small nets for the tests of decoupled_step_."""

from __future__ import annotations

import itertools

import torch
from device import serving
from tolerance import accumulation_dtype

import lgd_kernels as lgd
from lgd_kernels import reference

SERVED_BY = serving("decoupled_step_")
IN_PLACE = ("z", "multiplier", "velocity", "weight", "bias")
ALL = ("x", "target", *IN_PLACE)


def make(
    sizes=(4, 6, 6, 3),
    n=7,
    dtype=torch.float64,
    *,
    head="softmax_infogain",
    bias=True,
    multiplier=True,
    velocity=False,
    stacked=False,
):
    """The tensors of decoupled_step_ for a net of these widths, as lists of layers, or as stacks where widths agree."""

    def random(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    def of_samples(wanted=True):
        return [random(n, d) for d in sizes[1:-1]] if wanted else None

    of_parameters = accumulation_dtype(dtype)
    tensors = {
        "x": random(n, sizes[0]),
        "z": of_samples(),
        "weight": [
            (random(d_out, d_in) / max(d_in, 1) ** 0.5).to(of_parameters) for d_in, d_out in itertools.pairwise(sizes)
        ],
        "bias": [0.3 * random(d).to(of_parameters) for d in sizes[1:]] if bias else None,
        "target": torch.randint(sizes[-1], (n,)) if head == "softmax_infogain" else random(n, sizes[-1]),
        "multiplier": of_samples(multiplier),
        "velocity": of_samples(velocity),
    }
    if stacked:
        tensors |= {name: torch.stack(tensors[name]) for name in IN_PLACE if tensors[name]}
    return tensors


def listed(stacks):
    return [] if stacks is None else [stacks] if isinstance(stacks, torch.Tensor) else list(stacks)


def clone(tensors):
    def of(value):
        return value.clone() if isinstance(value, torch.Tensor) else value

    return {name: [of(v) for v in value] if isinstance(value, list) else of(value) for name, value in tensors.items()}


def parameters(tensors):
    return [*listed(tensors["weight"]), *listed(tensors["bias"])]


def layers_of(stacks):
    """The single layers of stacks (T_i, n, d), and of layers (n, d)."""
    return [layer for stack in stacks for layer in (stack if stack.dim() == 3 else [stack])]


def gradients(tensors):
    return [p.grad for p in parameters(tensors)]


def same(first, second):
    """Equal bit for bit, NaN included."""
    return first.shape == second.shape and first.dtype == second.dtype and first.equal(second)


def assert_same(first, second, names=ALL):
    for name in names:
        for t, (a, b) in enumerate(zip(listed(first[name]), listed(second[name]), strict=True)):
            assert same(a, b), f"{name}[{t}] differs by up to {(a.double() - b.double()).abs().max():.3g}"


def step(tensors, **options):
    return lgd.decoupled_step_(**tensors, **({"step_size": 0.2} | options))


def dense(C, row_sum=5.0):
    """(H, the same as a dense matrix), with rows that sum to anything."""
    matrix = row_sum * torch.randn(C, C, dtype=torch.float64)
    return lgd.Infogain.dense(matrix), matrix


def net():
    """Four samples, 3 -> 5 -> 5 -> 2."""
    return make((3, 5, 5, 2), n=4, dtype=torch.float32, velocity=True)


def arguments_of_op(tensors, rule, head="softmax_infogain"):
    """Those of ops.decoupled_step_ for a net of three layers in stacks."""

    def stacks(name, dim):
        return [v.unsqueeze(0) if v.dim() == dim else v for v in listed(tensors[name])]

    weight, bias = stacks("weight", 2), stacks("bias", 1)
    count = {"gradient": 1, "sgd": 0, "momentum": 1, "adam": 2}[rule]
    buffers = [[torch.zeros_like(p) for p in of if i < count] for of in (weight, bias) for i in range(2)]
    residual = [torch.zeros_like(v) for v in stacks("z", 2)]
    row = reference.UpdateNumbers(lr=0.1, momentum=0.9, second_momentum=0.99, epsilon=1e-8)
    numbers = torch.tensor([row] * (len(weight) + len(bias)), dtype=torch.float64)
    samples = [stacks(name, 2) for name in ("z", "multiplier", "velocity")]
    parts = lgd.Infogain.label_smoothing(0.1, 3).parts if head == "softmax_infogain" else (None,) * 6
    options = ([2, 2, 0], False, 1, 0.7, [1.0, 0.5, 1.0], [0.0, 1.0, 0.0], [1.0, 0.3, 1.0])
    return (
        *(tensors["x"], *samples, residual, weight, *buffers[:2], bias, *buffers[2:], tensors["target"], *parts),
        *(-100, head == "squared", *options, 2, 0.1, 0.5, 0.3),
        *(reference.UPDATE_RULES.index(rule), numbers),
    )
