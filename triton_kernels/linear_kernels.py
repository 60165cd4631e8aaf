"""Three products of matrices over all tiles of all layers of one shape and activation, each with all that belongs to it
in its epilogue.

A program has one tile: a loop over tiles takes 12 to 38 registers more, and in it Triton 3.6 forgets the constants of
tuples in tuples. A layer is always cut in the same way, so that its bits do not depend on the others:

    forward_kernel              phi(z) W^T      raw logits, which stay in registers, their residual and its energy
    weight_gradient_kernel      delta^T phi(z)
    input_gradient_kernel       delta W         times phi'(z), less skip * q

The gradient of a bias, sums of delta, has a kernel of its own.

Tiles of an operand are loaded by a tensor descriptor or by pointers, as linear_launches.py says; products are the same.

What becomes of a tile of a gradient is up to a function FINISH(to, layer, rows, columns, mask, gradient):
`store_gradient` here, or an update in update_rules.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import IDENTITY, activated
from .layers import (
    BRANCH_SCALE,
    NUMBERS,
    SKIP,
    judge,
    layer_at,
    load_layers,
    size_of,
    store_layers,
    within_layer,
)

GROUP = tl.constexpr(8)  # row tiles whose column tiles come one after the other: they share what they read in L2
BLOCK_S, BLOCK_O = tl.constexpr(32), tl.constexpr(64)  # samples and outputs of a tile of a bias's gradient


@triton.jit
def place_of_program(n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """(layer, row tile, column tile) of this program; programs of a layer follow one another."""
    row_tiles, column_tiles = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_columns, BLOCK_N)
    layer = tl.program_id(0) // (row_tiles * column_tiles)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    first = tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    row_tile, column_tile = first + within % height, within // height
    if WIDE:
        row_tile, column_tile = row_tile.to(tl.int64), column_tile.to(tl.int64)
    return layer, row_tile, column_tile


@triton.jit
def tile_of_program(n_rows, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """(layer, rows (BLOCK_M,), columns (BLOCK_N,)) of this program."""
    layer, row_tile, column_tile = place_of_program(n_rows, n_columns, BLOCK_M, BLOCK_N, WIDE)
    return layer, row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def as_operand(x, how, PHI: tl.constexpr):
    """phi(x), rounded, for a product."""
    if PHI != IDENTITY:
        x, _slope = activated(x.to(how.accumulated), PHI)
    return x.to(how.rounded).to(how.operand)


@triton.jit
def load_tile(at, descriptor, layer, first_row, first_column, TRANSPOSED: tl.constexpr, mask):
    """A tile (BLOCK_R, BLOCK_C) of a layer, or of its transpose if TRANSPOSED; 0 beyond its end: by a descriptor of all
    layers, or where there is none by pointers `at` and their mask, both (BLOCK_R, BLOCK_C)."""
    if descriptor is None:
        return tl.load(at, mask=mask, other=0)
    elif TRANSPOSED:
        tile = descriptor.load([layer, first_column, first_row])
        return tl.reshape(tile, (mask.shape[1], mask.shape[0])).T
    else:
        return tl.reshape(descriptor.load([layer, first_row, first_column]), mask.shape)


@triton.jit
def product(
    a,
    b,
    a_descriptor,
    b_descriptor,
    layer,
    row_tile,
    column_tile,
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
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    a_at, b_at = layer_at(a, layer), layer_at(b, layer)
    if TRANSPOSE_A:
        n_rows, depth_a = size_of(a, depth, n_rows, True), size_of(a, depth, n_rows, False)
    else:
        n_rows, depth_a = size_of(a, n_rows, depth, False), size_of(a, n_rows, depth, True)
    if TRANSPOSE_B:
        n_columns, depth_b = size_of(b, n_columns, depth, False), size_of(b, n_columns, depth, True)
    else:
        n_columns, depth_b = size_of(b, depth, n_columns, True), size_of(b, depth, n_columns, False)
    first_row, first_column = row_tile.to(tl.int32) * BLOCK_M, column_tile.to(tl.int32) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), how.accumulated)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K).to(rows.dtype)
        to_a = within_layer(a, rows[:, None], k[None, :], TRANSPOSE_A)
        to_b = within_layer(b, k[:, None], columns[None, :], TRANSPOSE_B)
        x = load_tile(  # (BLOCK_M, BLOCK_K)
            a_at + to_a, a_descriptor, layer, first_row, first, TRANSPOSE_A,
            mask=(rows < n_rows)[:, None] & (k < depth_a)[None, :]
        )  # fmt: skip
        y = load_tile(  # (BLOCK_K, BLOCK_N)
            b_at + to_b, b_descriptor, layer, first, first_column, TRANSPOSE_B,
            mask=(k < depth_b)[:, None] & (columns < n_columns)[None, :]
        )  # fmt: skip
        x, y = as_operand(x, how, PHI_A), as_operand(y, how, PHI_B)
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
    """`judge` for products in the place of raw logits, in PARTS of their rows one after the other; or, where raw logits
    are wanted, these alone."""
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
        logits = products * tl.load(numbers + BRANCH_SCALE)
        n_columns = size_of(io.target if io.logits is None else io.logits, n_rows, n_columns, True)
        mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        if bias is not None:
            at = layer_at(bias, layer) + within_layer(bias, 0, columns, False)
            logits += tl.load(at, mask=columns < n_columns, other=0).to(logits.dtype)[None, :]
        if io.logits is not None:
            store_layers(io.logits, layer, rows, columns, mask, logits)
            return tl.zeros((), logits.dtype)
        else:
            return judge(logits, io, numbers, layer, rows, columns, mask, ACTIVATION, LOSS)


@triton.jit
def forward_kernel(
    z,
    weight,
    z_descriptor,
    weight_descriptor,
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
    layer, row_tile, column_tile = place_of_program(n_samples, d_out, BLOCK_M, BLOCK_N, WIDE)
    products = product(
        z, weight, z_descriptor, weight_descriptor, layer, row_tile, column_tile, n_samples, d_out, d_in, how,
        PHI, IDENTITY, False, True, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    energy = judge_products(
        products, bias, io, numbers + NUMBERS * layer, layer, rows, columns, n_samples, d_out, ACTIVATION, LOSS, PARTS
    )  # fmt: skip
    tl.store(partial + tl.program_id(0), energy)


@triton.jit
def store_gradient(to, layer, rows, columns, mask, gradient):
    """What becomes of a tile of a gradient: it is stored."""
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
def weight_gradient_kernel(
    z,
    delta,
    z_descriptor,
    delta_descriptor,
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
    layer, row_tile, column_tile = place_of_program(d_out, d_in, BLOCK_M, BLOCK_N, WIDE)
    products = product(
        delta, z, delta_descriptor, z_descriptor, layer, row_tile, column_tile, d_out, d_in, n_samples, how,
        IDENTITY, PHI, True, False, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(numbers + NUMBERS * layer + BRANCH_SCALE) * upstream_of(upstream, layer, how.accumulated)
    finish(FINISH, to, layer, rows, columns, d_out, size_of(z, n_samples, d_in, True), products * scale, PARTS)


@triton.jit
def sum_of_samples(delta, layer, columns, n_samples, d_out, ACC: tl.constexpr):
    """Sums over the samples, (1, BLOCK_O), always in the same order."""
    total = tl.zeros((BLOCK_S, BLOCK_O), ACC)
    for first in range(0, n_samples, BLOCK_S):
        rows = first + tl.arange(0, BLOCK_S)
        mask = (rows < n_samples)[:, None] & (columns < d_out)[None, :]
        total += load_layers(delta, layer, rows, columns, mask, ACC)  # (BLOCK_S, BLOCK_O)
    return tl.sum(total, 0)[None, :]


@triton.jit
def bias_gradient_kernel(delta, upstream, to, n_samples, d_out, how, FINISH: tl.constexpr):
    """FINISH with one tile of the gradient of a bias, (1, BLOCK_O).

    The loop is a function of its own: Triton forgets constants of tuples in tuples, such as `to`, in what comes after a
    loop or a branch at run time."""
    column_tiles = tl.cdiv(d_out, BLOCK_O)
    layer, first_column = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles * BLOCK_O
    columns = first_column + tl.arange(0, BLOCK_O)
    gradient = sum_of_samples(delta, layer, columns, n_samples, d_out, how.accumulated)
    gradient *= upstream_of(upstream, layer, how.accumulated)
    FINISH(to, layer, tl.zeros((1,), tl.int32), columns, (columns < d_out)[None, :], gradient)


@triton.jit
def finish_input(
    FINISH: tl.constexpr,
    to,
    products,
    z,
    q,
    upstream,
    numbers,
    layer,
    rows,
    columns,
    n_rows,
    n_columns,
    PHI: tl.constexpr,
    PARTS: tl.constexpr,
):
    """FINISH with the gradient of z, made of delta W, in PARTS of its rows one after the other."""
    if PARTS > 1:
        first, last = halves(products)
        start = tl.min(rows, 0) + tl.arange(0, first.shape[0])
        finish_input(
            FINISH, to, first, z, q, upstream, numbers, layer, start, columns, n_rows, n_columns, PHI, PARTS // 2
        )  # fmt: skip
        start += first.shape[0]
        finish_input(
            FINISH, to, last, z, q, upstream, numbers, layer, start, columns, n_rows, n_columns, PHI, PARTS // 2
        )  # fmt: skip
    else:
        ACC: tl.constexpr = products.dtype
        n_columns = size_of(z, n_rows, n_columns, True)
        mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
        g = upstream_of(upstream, layer, ACC)
        skip, branch_scale = tl.load(numbers + SKIP), tl.load(numbers + BRANCH_SCALE)
        gradient = products * (branch_scale * g)
        if PHI != IDENTITY:
            _phi, slope = activated(load_layers(z, layer, rows, columns, mask, ACC), PHI)
            gradient *= slope
        if q is not None:
            pull = load_layers(q, layer, rows, columns, mask, ACC)
            gradient = tl.where(skip == 0, gradient, gradient - skip * g * pull)
        FINISH(to, layer, rows, columns, mask, gradient)


@triton.jit
def input_gradient_kernel(
    z,
    weight,
    delta,
    weight_descriptor,
    delta_descriptor,
    q,
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
    """FINISH with one tile of the gradient of z."""
    layer, row_tile, column_tile = place_of_program(n_samples, d_in, BLOCK_M, BLOCK_N, WIDE)
    products = product(
        delta, weight, delta_descriptor, weight_descriptor, layer, row_tile, column_tile, n_samples, d_in, d_out, how,
        IDENTITY, IDENTITY, False, False, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    rows, columns = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    finish_input(
        FINISH, to, products, z, q, upstream, numbers + NUMBERS * layer, layer, rows, columns, n_samples, d_in,
        PHI, PARTS
    )  # fmt: skip
