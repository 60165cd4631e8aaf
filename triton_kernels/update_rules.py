"""What becomes of a tile of a gradient in decoupled_step_: an update, in the epilogue of the product that makes it.

Each function is a FINISH of linear_kernels.py. The rules for parameters are those of `update_` in
reference/decoupled_step.py, by the positions in its UPDATE_RULES.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .layers import NUMBERS, STEP_SIZE, Z_MOMENTUM, Layers, load_layers, store_layers

# places in the numbers of a step, `UpdateNumbers` of the reference
LR, MOMENTUM, SECOND_MOMENTUM, EPSILON, L2, DECAY, ROOT = map(tl.constexpr, range(7))
UPDATE_NUMBERS = tl.constexpr(7)


class Hidden(NamedTuple):
    """Hidden values, what their targets pull at them with, and where their step's numbers are."""

    z: Layers
    velocity: Layers | None
    pull: Layers  # q of the layers below
    numbers: Tensor  # (L, NUMBERS)


class Parameters(NamedTuple):
    """Parameters and what their optimizer keeps, and where their step's numbers are."""

    value: Layers
    first: Layers | None
    second: Layers | None
    numbers: Tensor  # (S, UPDATE_NUMBERS) float64: 1 - beta cancels in single precision
    places: Tensor  # (L,) int64: the row of `numbers` for every layer


@triton.jit
def move_hidden(to, layer, rows, columns, mask, gradient):
    """velocity = z_momentum velocity + dE/dz, z -= step_size velocity. gradient: what the layer above adds to it."""
    ACC: tl.constexpr = gradient.dtype
    numbers = to.numbers + NUMBERS * layer
    gradient += load_layers(to.pull, layer, rows, columns, mask, ACC)
    if to.velocity is not None:
        gradient += tl.load(numbers + Z_MOMENTUM) * load_layers(to.velocity, layer, rows, columns, mask, ACC)
        store_layers(to.velocity, layer, rows, columns, mask, gradient)
    z = load_layers(to.z, layer, rows, columns, mask, ACC)
    store_layers(to.z, layer, rows, columns, mask, z - tl.load(numbers + STEP_SIZE) * gradient)


@triton.jit
def number(to, layer, PLACE: tl.constexpr):
    """A number of the step of a layer, in float64."""
    return tl.load(to.numbers + UPDATE_NUMBERS * tl.load(to.places + layer) + PLACE)


@triton.jit
def keep_gradient(to, layer, rows, columns, mask, gradient):
    """first = g"""
    store_layers(to.first, layer, rows, columns, mask, gradient)


@triton.jit
def sgd(to, layer, rows, columns, mask, gradient):
    """w -= lr (g + l2 w)"""
    ACC: tl.constexpr = gradient.dtype
    w = load_layers(to.value, layer, rows, columns, mask, ACC)
    gradient += number(to, layer, L2).to(ACC) * w
    store_layers(to.value, layer, rows, columns, mask, w - number(to, layer, LR).to(ACC) * gradient)


@triton.jit
def sgd_with_momentum(to, layer, rows, columns, mask, gradient):
    """first = momentum first + g + l2 w, w -= lr first"""
    ACC: tl.constexpr = gradient.dtype
    w = load_layers(to.value, layer, rows, columns, mask, ACC)
    first = number(to, layer, MOMENTUM).to(ACC) * load_layers(to.first, layer, rows, columns, mask, ACC)
    first += gradient + number(to, layer, L2).to(ACC) * w
    store_layers(to.first, layer, rows, columns, mask, first)
    store_layers(to.value, layer, rows, columns, mask, w - number(to, layer, LR).to(ACC) * first)


@triton.jit
def square_root(x):
    """Rounded once; `tl.sqrt` is an approximation in single precision."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def adam(to, layer, rows, columns, mask, gradient):
    """Adam and AdamW: w *= decay, then the moments of g + l2 w, and w -= lr first / (sqrt(second) / root + epsilon)"""
    ACC: tl.constexpr = gradient.dtype
    w = load_layers(to.value, layer, rows, columns, mask, ACC) * number(to, layer, DECAY).to(ACC)
    gradient += number(to, layer, L2).to(ACC) * w
    first = load_layers(to.first, layer, rows, columns, mask, ACC)
    first += (1 - number(to, layer, MOMENTUM)).to(ACC) * (gradient - first)
    beta = number(to, layer, SECOND_MOMENTUM)
    second = load_layers(to.second, layer, rows, columns, mask, ACC)
    second = beta.to(ACC) * second + (1 - beta).to(ACC) * gradient * gradient
    store_layers(to.first, layer, rows, columns, mask, first)
    store_layers(to.second, layer, rows, columns, mask, second)
    step = first / (square_root(second) / number(to, layer, ROOT).to(ACC) + number(to, layer, EPSILON).to(ACC))
    store_layers(to.value, layer, rows, columns, mask, w - number(to, layer, LR).to(ACC) * step)


RULES = (keep_gradient, sgd, sgd_with_momentum, adam)
