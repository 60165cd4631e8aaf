"""decoupled_linear in Triton: three products of matrices, each with all that belongs to it in its epilogue.

The functions at the end have the signatures and the results of `reference/decoupled_linear.py`, which says what they
compute. A launch is over all tiles of all layers of one shape and activation, those of a stack or single ones, and a
program has one tile. It is always cut in the same way, so that a layer's bits do not depend on the others:

    forward_kernel              phi(z) W^T      raw logits, which stay in registers, their residual and its energy
    parameter_gradient_kernel   delta^T phi(z)  the weight's gradient; the bias's from programs of their own
    input_gradient_kernel       delta W         times phi'(z), less skip * q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import IDENTITY, activated
from .common import INT32_MAX, INTERPRETED, architecture_of, extent, launch
from .layers import (
    Layers,
    ResidualIo,
    accumulation_dtype,
    groups_of,
    judge,
    layer_at,
    load_layers,
    numbers_of_layers,
    size_of,
    stack_layers,
    store_layers,
    sum_energy,
    triton_dtype,
    within_layer,
)

OPS = ("decoupled_linear", "decoupled_linear_backward")
MOST_REGISTERS = 255  # that a thread can have
GROUP = tl.constexpr(8)  # row tiles whose column tiles come one after the other: they share what they read in L2
BLOCK_S, BLOCK_O = tl.constexpr(32), tl.constexpr(64)  # samples and outputs of a tile of a bias's gradient


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearTiles:
    """How a product is cut: a program has (rows, columns) of it, and sums up `depth` terms at a time."""

    rows: int
    columns: int
    depth: int
    parts: int  # in which the epilogue goes through the rows: at once it takes more registers than there are
    num_warps: int
    num_stages: int
    registers: int  # of a thread at most; left to itself, the compiler spills a few to have more programs at a time


def linear_tiles(rows: int, columns: int, widest: int, precision: str, architecture: int) -> LinearTiles:
    """The tiles of products (rows, columns), from the numbers alone that one layer has.

    widest: bytes of an element of the widest tensor that is read for the product.
    precision: "half", "tf32", "ieee" (float32 without tensor cores) or "float64".
    architecture: 90 for compute capability 9.0.
    """
    if precision == "float64":
        return LinearTiles(32, 32, 16, parts=1, num_warps=4, num_stages=2, registers=MOST_REGISTERS)
    if precision == "ieee":  # no tensor cores
        return LinearTiles(64, 64, 16, parts=1, num_warps=4, num_stages=2, registers=MOST_REGISTERS)
    block_rows = 128 if rows > 64 else 64
    block_columns = 128 if columns > 64 else 64 if columns > 32 else 32
    num_warps = 8 if block_rows * block_columns > 64 * 64 else 4
    numbers = block_rows * block_columns // (32 * num_warps)  # of the tile, for a thread
    deep = architecture >= 90  # before, activated operands of a product 128 bytes deep do not fit the registers
    return LinearTiles(
        block_rows,
        block_columns,
        depth=(128 if deep else 64) // widest,
        parts=max(numbers // 8, 1),
        num_warps=num_warps,
        num_stages=3 if deep else 4,
        registers=128
        if architecture == 90 and num_warps == 8 and widest == 2
        else 168,  # 2 programs of 8 warps, 3 of 4
    )


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """How the kernels multiply."""

    rounded: tl.constexpr  # to this dtype operands are rounded
    operand: tl.constexpr  # and in this one they are multiplied
    accumulated: tl.constexpr
    precision: tl.constexpr  # of `tl.dot`


@triton.jit
def tile_of_program(n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """(layer, rows (BLOCK_M,), columns (BLOCK_N,)) of this program; programs of a layer follow one another."""
    row_tiles, column_tiles = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N)
    layer = tl.program_id(0) // (row_tiles * column_tiles)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    row_tile, column_tile = first + within % height, within // height
    if WIDE:
        row_tile, column_tile = row_tile.to(tl.int64), column_tile.to(tl.int64)
    return layer, row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def as_operand(x, how, PHI: tl.constexpr):
    """phi(x), rounded, for a product."""
    if PHI != IDENTITY:
        x, _slope = activated(x.to(how.accumulated), PHI)
    return x.to(how.rounded).to(how.operand)


@triton.jit
def product(
    a,
    b,
    layer,
    rows,
    columns,
    n_rows,
    n_columns,
    depth,
    how,
    PHI_A: tl.constexpr,
    PHI_B: tl.constexpr,
    TRANSPOSE_A: tl.constexpr,
    TRANSPOSE_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile (BLOCK_M, BLOCK_N) of phi_a(A) phi_b(B), both of them a layer or its transpose, over the whole depth."""
    a_at, b_at = layer_at(a, layer), layer_at(b, layer)
    if TRANSPOSE_A:
        n_rows, depth_a = size_of(a, depth, n_rows, True), size_of(a, depth, n_rows, False)
    else:
        n_rows, depth_a = size_of(a, n_rows, depth, False), size_of(a, n_rows, depth, True)
    if TRANSPOSE_B:
        n_columns, depth_b = size_of(b, n_columns, depth, False), size_of(b, n_columns, depth, True)
    else:
        n_columns, depth_b = size_of(b, depth, n_columns, True), size_of(b, depth, n_columns, False)
    total = tl.zeros((BLOCK_M, BLOCK_N), how.accumulated)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(rows.dtype)
        to_a = within_layer(a, rows[:, None], k[None, :], TRANSPOSE_A)
        to_b = within_layer(b, k[:, None], columns[None, :], TRANSPOSE_B)
        x = tl.load(a_at + to_a, mask=(rows < n_rows)[:, None] & (k < depth_a)[None, :], other=0)  # (BLOCK_M, BLOCK_K)
        y = tl.load(b_at + to_b, mask=(k < depth_b)[:, None] & (columns < n_columns)[None, :], other=0)
        x, y = as_operand(x, how, PHI_A), as_operand(y, how, PHI_B)  # y: (BLOCK_K, BLOCK_N)
        total = tl.dot(x, y, total, input_precision=how.precision, out_dtype=how.accumulated)
    return total


@triton.jit
def halves(tile):
    """The first and the last rows of a tile, (BLOCK_M / 2, BLOCK_N) each.

    Rows, because they are dealt out to all threads again then, so that loads and stores are 16 bytes wide; in halves of
    the columns a thread keeps the two neighbours that the product left it."""
    return tl.split(tl.permute(tl.reshape(tile, (2, tile.shape[0] // 2, tile.shape[1])), (1, 2, 0)))


@triton.jit
def judge_products(
    products,
    bias,
    io,
    numbers,
    layer,
    rows,
    columns,
    n_rows,
    n_columns,
    ACTIVATION: tl.constexpr,
    LOSS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`judge` for products in the place of raw logits, in PARTS of their rows one after the other."""
    if PARTS > 1:
        first, last = halves(products)
        start = tl.min(rows, 0) + tl.arange(0, first.shape[0])
        energy = judge_products(
            first, bias, io, numbers, layer, start, columns, n_rows, n_columns, ACTIVATION, LOSS, PARTS // 2
        )  # fmt: skip
        start += first.shape[0]
        return energy + judge_products(
            last, bias, io, numbers, layer, start, columns, n_rows, n_columns, ACTIVATION, LOSS, PARTS // 2
        )  # fmt: skip
    else:
        logits = products * tl.load(numbers + 2)
        n_columns = size_of(io.target, n_rows, n_columns, True)
        mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        if bias is not None:
            at = layer_at(bias, layer) + within_layer(bias, 0, columns, False)
            logits += tl.load(at, mask=columns < n_columns, other=0).to(logits.dtype)[None, :]
        return judge(logits, io, numbers, layer, rows, columns, mask, ACTIVATION, LOSS)


@triton.jit
def forward_kernel(
    z,
    weight,
    bias,
    io,
    numbers,
    partial,
    n_samples,
    d_in,
    d_out,
    how,
    PHI: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOSS: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Whatever is wanted for one tile of the raw logits of one layer, and its energy."""
    layer, rows, columns = tile_of_program(n_samples, d_out, BLOCK_M, BLOCK_N, WIDE)
    products = product(
        z, weight, layer, rows, columns, n_samples, d_out, d_in, how,
        PHI, IDENTITY, False, True, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    energy = judge_products(
        products, bias, io, numbers + 5 * layer, layer, rows, columns, n_samples, d_out, ACTIVATION, LOSS, PARTS
    )  # fmt: skip
    tl.store(partial + tl.program_id(0), energy)


@triton.jit
def store_gradient(to, layer, rows, columns, mask, gradient):
    """What becomes of a tile of a parameter's gradient: it is stored."""
    store_layers(to, layer, rows, columns, mask, gradient)


@triton.jit
def upstream_of(upstream, layer, ACC: tl.constexpr):
    """The upstream gradient of a layer's energy, which counts as 1 where there is none."""
    if upstream is not None:
        return tl.load(layer_at(upstream, layer)).to(ACC)
    else:
        return tl.full((), 1, ACC)


@triton.jit
def finish(
    FINISH: tl.constexpr, to, layer, rows, columns, n_rows, n_columns, gradient, PARTS: tl.constexpr
):  # fmt: skip
    """FINISH with a tile of a gradient, in PARTS of its rows one after the other."""
    if PARTS > 1:
        first, last = halves(gradient)
        start = tl.min(rows, 0) + tl.arange(0, first.shape[0])
        finish(FINISH, to, layer, start, columns, n_rows, n_columns, first, PARTS // 2)
        start += first.shape[0]
        finish(FINISH, to, layer, start, columns, n_rows, n_columns, last, PARTS // 2)
    else:
        FINISH(to, layer, rows, columns, (rows < n_rows)[:, None] & (columns < n_columns)[None, :], gradient)


@triton.jit
def weight_tile(
    z,
    delta,
    upstream,
    to,
    numbers,
    n_samples,
    d_in,
    d_out,
    how,
    FINISH: tl.constexpr,
    PHI: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """FINISH with one tile of the gradient of a weight, (BLOCK_M, BLOCK_N)."""
    layer, rows, columns = tile_of_program(d_out, d_in, BLOCK_M, BLOCK_N, WIDE)
    products = product(
        delta, z, layer, rows, columns, d_out, d_in, n_samples, how,
        IDENTITY, PHI, True, False, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    scale = tl.load(numbers + 5 * layer + 2) * upstream_of(upstream, layer, how.accumulated)
    finish(FINISH, to, layer, rows, columns, d_out, size_of(z, n_samples, d_in, True), products * scale, PARTS)


@triton.jit
def bias_tile(delta, upstream, to, program, n_samples, d_out, ACC: tl.constexpr, FINISH: tl.constexpr):
    """FINISH with one tile of the gradient of a bias, (1, BLOCK_O): sums over the samples, always in the same order."""
    column_tiles = tl.cdiv(d_out, BLOCK_O)
    layer, first_column = program // column_tiles, program % column_tiles * BLOCK_O
    columns = first_column + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_S, BLOCK_O), ACC)
    for first in range(0, n_samples, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = (rows < n_samples)[:, None] & (columns < d_out)[None, :]
        total += load_layers(delta, layer, rows, columns, mask, ACC)  # (BLOCK_S, BLOCK_O)
    gradient = (tl.sum(total, 0) * upstream_of(upstream, layer, ACC))[None, :]
    FINISH(to, layer, tl.zeros((1,), tl.int32), columns, (columns < d_out)[None, :], gradient)


@triton.jit
def parameter_gradient_kernel(
    z,
    delta,
    upstream,
    of_weight,
    of_bias,
    numbers,
    weight_programs,
    n_samples,
    d_in,
    d_out,
    how,
    FINISH: tl.constexpr,
    PHI: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """FINISH with the gradient of the weight, in so many programs, and of the bias, in those that follow them."""
    if tl.program_id(0) < weight_programs:
        if of_weight is not None:
            weight_tile(
                z, delta, upstream, of_weight, numbers, n_samples, d_in, d_out, how,
                FINISH, PHI, WIDE, PARTS, BLOCK_M, BLOCK_N, BLOCK_K
            )  # fmt: skip
    elif of_bias is not None:
        program = tl.program_id(0) - weight_programs
        bias_tile(delta, upstream, of_bias, program, n_samples, d_out, how.accumulated, FINISH)


@triton.jit
def carry_to_input(
    products,
    z,
    q,
    upstream,
    to,
    numbers,
    layer,
    rows,
    columns,
    n_rows,
    n_columns,
    PHI: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store the gradient of z, from delta W, in PARTS of its rows one after the other."""
    if PARTS > 1:
        first, last = halves(products)
        start = tl.min(rows, 0) + tl.arange(0, first.shape[0])
        carry_to_input(
            first, z, q, upstream, to, numbers, layer, start, columns, n_rows, n_columns, PHI, PARTS // 2
        )  # fmt: skip
        start += first.shape[0]
        carry_to_input(last, z, q, upstream, to, numbers, layer, start, columns, n_rows, n_columns, PHI, PARTS // 2)
    else:
        ACC: tl.constexpr = products.dtype
        n_columns = size_of(to, n_rows, n_columns, True)
        mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        g = upstream_of(upstream, layer, ACC)
        skip, branch_scale = tl.load(numbers + 1), tl.load(numbers + 2)
        gradient = products * (branch_scale * g)
        if PHI != IDENTITY:
            _phi, slope = activated(load_layers(z, layer, rows, columns, mask, ACC), PHI)
            gradient *= slope
        if q is not None:
            pull = load_layers(q, layer, rows, columns, mask, ACC)
            gradient = tl.where(skip == 0, gradient, gradient - skip * g * pull)
        store_layers(to, layer, rows, columns, mask, gradient)


@triton.jit
def input_gradient_kernel(
    z,
    weight,
    delta,
    q,
    upstream,
    grad_z,
    numbers,
    n_samples,
    d_in,
    d_out,
    how,
    PHI: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the gradient of z."""
    layer, rows, columns = tile_of_program(n_samples, d_in, BLOCK_M, BLOCK_N, WIDE)
    products = product(
        delta, weight, layer, rows, columns, n_samples, d_in, d_out, how,
        IDENTITY, IDENTITY, False, False, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    carry_to_input(
        products, z, q, upstream, grad_z, numbers + 5 * layer, layer, rows, columns, n_samples, d_in, PHI, PARTS
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def _precision(operand: torch.dtype) -> str:
    """How products of this dtype are made; float32 on tensor cores only where torch's own products are."""
    if operand == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "float64" if operand == torch.float64 else "half"


def _how(accumulate: torch.dtype, rounded: torch.dtype) -> tuple[Product, str]:
    """(how to multiply what is rounded to a dtype, the name of that precision)."""
    exact = INTERPRETED or accumulate == torch.float64  # Triton's interpreter does not multiply bfloat16
    precision = _precision(torch.float64 if accumulate == torch.float64 else rounded)
    dtypes = (rounded, accumulate if exact else rounded, accumulate)
    return Product(
        *(tl.constexpr(triton_dtype(dtype)) for dtype in dtypes),
        tl.constexpr("tf32" if precision == "tf32" else "ieee"),
    ), precision


def _phi_and_f(activation: int, preactivation: bool) -> tuple[int, int]:
    """What is applied to the input of a layer, and what to its raw logits."""
    return (activation, IDENTITY.value) if preactivation else (IDENTITY.value, activation)


def _wide(*tensors: Tensor | None) -> bool:
    """Whether offsets within a layer need 64 bits; beyond its end lies at most a tile."""
    return max(extent(x if x is None or x.dim() == 2 else x[0]) for x in tensors) > INT32_MAX - 2**20


def _check(z: Sequence[Tensor], **others: tuple[Sequence[Tensor | None], Sequence[tuple[int, ...]]]) -> None:
    """No kernel may read beyond its arguments, whoever calls the op. others: tensors, and the shapes they must have."""
    for name, (tensors, shapes) in others.items():
        if len(tensors) != len(z):
            raise ValueError(f"{name}: has {len(tensors)} stacks, but z has {len(z)}")
        for x, shape in zip(tensors, shapes, strict=True):
            if x is not None and x.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")


def _shapes(z: Sequence[Tensor], weight: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """What the shapes of the weights must be for z, and those of the layers' outputs."""
    both = list(zip(z, weight, strict=True))
    weights = [(*x.shape[:-2], w.shape[-2], x.shape[-1]) for x, w in both]
    return weights, [(*x.shape[:-1], w.shape[-2]) for x, w in both]


def _outputs(
    wanted: Sequence[bool], like: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(an output for every stack, one without elements where it is not wanted; the same with None there)."""
    made = [
        x.new_empty(shape if want else (0,), dtype=as_in.dtype)
        for want, x, shape, as_in in zip(wanted, like, shapes, dtypes, strict=True)
    ]
    return made, _if(wanted, made)


def _if(wanted: Sequence[bool], stacks: Sequence[Tensor]) -> list[Tensor | None]:
    return [x if want else None for x, want in zip(stacks, wanted, strict=True)]


def decoupled_linear(
    z: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor | None],
    target: list[Tensor],
    multiplier: list[Tensor | None],
    activation: list[int],
    preactivation: bool,
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    branch_scale: list[float],
    dual_step: list[float],
    need_residual: list[bool],
    need_gradient: list[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Energy (T,) of every layer; for stacks on request the residual e; on request delta and q, (T_i, n, d_out)."""
    weights, outputs = _shapes(z, weight)
    biases = [shape[:-1] for shape in weights]
    _check(z, weight=(weight, weights), bias=(bias, biases), target=(target, outputs), multiplier=(multiplier, outputs))
    residual, to_residual = _outputs(need_residual, z, outputs, z)
    delta, to_delta = _outputs(need_gradient, z, outputs, z)
    q, to_q = _outputs(need_gradient, z, outputs, z)
    accumulate = accumulation_dtype(z[0].dtype)
    energy = z[0].new_empty(len(activation), dtype=accumulate)
    per_layer = list(zip(rho, skip, branch_scale, dual_step, [kappa] * len(activation), strict=True))
    lists = (z, weight, bias, target, multiplier)
    for group in groups_of(lists, activation, need_residual, need_gradient):
        stack, layers = group.stacks[0], group.layers
        x, w, y = z[stack], weight[stack], target[stack]
        (n_samples, d_in), d_out = x.shape[-2:], w.shape[-2]
        phi, f = _phi_and_f(activation[layers[0]], preactivation)
        how, precision = _how(accumulate, w.dtype)
        tiles = linear_tiles(n_samples, d_out, max(x.itemsize, w.itemsize), precision, architecture_of(x.device))
        n_tiles = triton.cdiv(n_samples, tiles.rows) * triton.cdiv(d_out, tiles.columns)
        of_z, of_weight = group.of(z), group.of(weight)
        io = ResidualIo(
            target=group.of(target),
            multiplier=group.of(multiplier),
            skip_input=of_z if any(skip[t] for t in layers) else None,
            residual=group.of(to_residual),
            delta=group.of(to_delta),
            q=group.of(to_q),
        )
        partial = energy.new_empty(len(layers), n_tiles)
        launch(
            forward_kernel,
            (partial.numel(),),
            x,
            of_z,
            of_weight,
            group.of(bias),
            io,
            numbers_of_layers([per_layer[t] for t in layers], accumulate, x.device),
            partial,
            n_samples,
            d_in,
            d_out,
            how,
            PHI=phi,
            ACTIVATION=f,
            LOSS=hidden_loss,
            WIDE=_wide(x, w, y, multiplier[stack], to_q[stack]),
            PARTS=tiles.parts,
            **_launch_options(tiles, d_in, d_out, of_z, of_weight, *io),
        )
        sum_energy(partial, energy, layers)
    return energy, residual, delta, q


def _launch_options(tiles: LinearTiles, d_in: int, d_out: int, *layers: Layers | None) -> dict[str, int]:
    even = d_in % 16 == d_out % 16 == 0 and all(x is None or x.align.value > 1 for x in layers)
    return {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.depth,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "maxnreg": tiles.registers if even else MOST_REGISTERS,  # of which no result depends; uneven: many addresses
    }


def decoupled_linear_backward(
    z: list[Tensor],
    weight: list[Tensor],
    e: list[Tensor],
    delta: list[Tensor],
    q: list[Tensor],
    grad_energy: Tensor | None,
    activation: list[int],
    preactivation: bool,
    skip: list[float],
    branch_scale: list[float],
    need_z: list[bool],
    need_weight: list[bool],
    need_bias: list[bool],
    need_target: list[bool],
    need_multiplier: list[bool],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of sum(grad_energy * energy) with respect to all five tensors, from what the forward pass made."""
    weights, outputs = _shapes(z, weight)
    need_parameters = [a or b for a, b in zip(need_weight, need_bias, strict=True)]
    delta = _if([a or b for a, b in zip(need_z, need_parameters, strict=True)], delta)
    of_target, of_multiplier = _if(need_target, q), _if(need_multiplier, e)
    q = _if(need_z, q)
    _check(z, weight=(weight, weights), delta=(delta, outputs), q=(q, outputs))
    _check(z, q=(of_target, outputs), e=(of_multiplier, outputs))
    grad_z, to_z = _outputs(need_z, z, [x.shape for x in z], z)
    grad_weight, to_weight = _outputs(need_weight, z, weights, weight)
    grad_bias, to_bias = _outputs(need_bias, z, [shape[:-1] for shape in weights], weight)
    accumulate = accumulation_dtype(z[0].dtype)
    if grad_energy is not None:
        _check([grad_energy], grad_energy=([grad_energy], [(len(activation),)]))
    per_layer = list(zip(skip, branch_scale, strict=True))
    lists = (z, weight, delta, q)
    for group in groups_of(lists, activation, need_z, need_weight, need_bias):
        stack, layers = group.stacks[0], group.layers
        if delta[stack] is None:
            continue
        x, w, d = z[stack], weight[stack], delta[stack]
        (n_samples, d_in), d_out = x.shape[-2:], w.shape[-2]
        phi, _ = _phi_and_f(activation[layers[0]], preactivation)
        how, precision = _how(accumulate, w.dtype)
        architecture, widest = architecture_of(x.device), max(x.itemsize, w.itemsize, d.itemsize)
        of_z, of_weight, of_delta = group.of(z), group.of(weight), group.of(delta)
        upstream = stack_layers(grad_energy, layers)
        numbers = numbers_of_layers([(0.0, *per_layer[t], 0.0, 0.0) for t in layers], accumulate, x.device)
        shared = {"PHI": phi, "WIDE": _wide(x, w, d, q[stack], to_z[stack])}
        if need_z[stack]:
            tiles = linear_tiles(n_samples, d_in, widest, precision, architecture)
            launch(
                input_gradient_kernel,
                (len(layers) * triton.cdiv(n_samples, tiles.rows) * triton.cdiv(d_in, tiles.columns),),
                x,
                of_z,
                of_weight,
                of_delta,
                group.of(q) if any(skip[t] for t in layers) else None,
                upstream,
                group.of(to_z),
                numbers,
                n_samples,
                d_in,
                d_out,
                how,
                PARTS=tiles.parts,
                **shared,
                **_launch_options(tiles, d_in, d_out, of_z, of_weight, of_delta),
            )
        if need_parameters[stack]:
            tiles = linear_tiles(d_out, d_in, widest, precision, architecture)
            of_weights = len(layers) * triton.cdiv(d_out, tiles.rows) * triton.cdiv(d_in, tiles.columns)
            of_weights *= need_weight[stack]
            of_biases = len(layers) * triton.cdiv(d_out, BLOCK_O.value) * need_bias[stack]
            launch(
                parameter_gradient_kernel,
                (of_weights + of_biases,),
                x,
                of_z,
                of_delta,
                upstream,
                group.of(to_weight),
                group.of(to_bias),
                numbers,
                of_weights,
                n_samples,
                d_in,
                d_out,
                how,
                FINISH=store_gradient,
                PARTS=tiles.parts,
                **shared,
                **_launch_options(tiles, d_in, d_out, of_z, of_weight, of_delta),
            )
    grad_target = _scaled(of_target, grad_energy, z, accumulate)
    return grad_z, grad_weight, grad_bias, grad_target, _scaled(of_multiplier, grad_energy, z, accumulate)


def _scaled(
    stacks: Sequence[Tensor | None], factors: Tensor | None, like: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What was wanted, times the factor of every layer, as new contiguous tensors."""
    made, begin = [], 0
    for x, of_stack in zip(stacks, like, strict=True):
        count = 1 if of_stack.dim() == 2 else len(of_stack)
        if x is None:
            made.append(of_stack.new_empty(0))
        elif factors is None:
            made.append(x.clone(memory_format=torch.contiguous_format))
        else:
            of_layers = factors[begin : begin + count].to(dtype).view(-1, 1, 1)
            result = of_stack.new_empty(x.shape)
            result.view(count, *x.shape[-2:]).copy_(x.reshape(count, *x.shape[-2:]) * of_layers)
            made.append(result)
        begin += count
    return made
