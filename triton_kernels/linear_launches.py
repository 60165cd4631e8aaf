"""The launches of linear_kernels.py: for layers of one shape and activation, whichever op they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .activations import IDENTITY
from .common import INT32_MAX, architecture_of, extent, launch
from .layers import LayerNumbers, Layers, Operand, ResidualIo, numbers_of_layers
from .linear_kernels import (
    BLOCK_O,
    bias_gradient_kernel,
    forward_kernel,
    input_gradient_kernel,
    store_gradient,
    weight_gradient_kernel,
)
from .linear_tiles import Arithmetic, LinearTiles, linear_tiles


class Sizes(NamedTuple):
    """Of the layers of a launch."""

    layers: int
    samples: int
    d_in: int
    d_out: int


def phi_and_f(activation: int, preactivation: bool) -> tuple[int, int]:
    """What is applied to the input of a layer, and what to its raw logits."""
    return (activation, IDENTITY.value) if preactivation else (IDENTITY.value, activation)


def launch_forward(
    sizes: Sizes,
    z: Operand,
    weight: Operand,
    bias: Layers | None,
    io: ResidualIo,
    numbers: Sequence[LayerNumbers],
    how: Arithmetic,
    phi: int,
    f: int,
    hidden_loss: int,
) -> Tensor:
    """Store what `io` wants; the energies (L, tiles) of the tiles."""
    tiles = _tiles(sizes, (sizes.samples, sizes.d_out), how, (z.layers, weight.layers), io)
    n_tiles = triton.cdiv(sizes.samples, tiles.rows) * triton.cdiv(sizes.d_out, tiles.columns)
    data = z.layers.data
    partial = data.new_empty(sizes.layers, n_tiles, dtype=how.accumulate)
    launch(
        forward_kernel,
        (partial.numel(),),
        data,
        z.layers,
        weight.layers,
        *_descriptors(tiles, (z, tiles.rows, tiles.depth), (weight, tiles.columns, tiles.depth)),
        bias,
        io,
        numbers_of_layers(numbers, how.accumulate, data.device),
        partial,
        *sizes[1:],
        how.product,
        PHI=phi,
        ACTIVATION=f,
        LOSS=hidden_loss,
        **_options(tiles, z.layers, weight.layers, bias, *io),
    )
    return partial


def launch_input_gradient(
    sizes: Sizes,
    z: Layers,
    weight: Operand,
    delta: Operand,
    q: Layers | None,
    upstream: Layers | None,
    to: Any,
    numbers: Sequence[LayerNumbers],
    how: Arithmetic,
    phi: int,
    finish: Any = store_gradient,
) -> None:
    """`finish` with the gradients of z. q: only where a layer has a skip."""
    tiles = _tiles(sizes, (sizes.samples, sizes.d_in), how, (z, weight.layers, delta.layers))
    n_tiles = triton.cdiv(sizes.samples, tiles.rows) * triton.cdiv(sizes.d_in, tiles.columns)
    launch(
        input_gradient_kernel,
        (sizes.layers * n_tiles,),
        z.data,
        z,
        weight.layers,
        delta.layers,
        *_descriptors(tiles, (weight, tiles.depth, tiles.columns), (delta, tiles.rows, tiles.depth)),
        q,
        upstream,
        to,
        numbers_of_layers(numbers, how.accumulate, z.data.device),
        *sizes[1:],
        how.product,
        FINISH=finish,
        PHI=phi,
        **_options(tiles, z, weight.layers, delta.layers, q, *_layers_in(to)),
    )


def launch_weight_gradient(
    sizes: Sizes,
    z: Operand,
    delta: Operand,
    upstream: Layers | None,
    to: Any,
    numbers: Sequence[LayerNumbers],
    how: Arithmetic,
    phi: int,
    finish: Any = store_gradient,
) -> None:
    """`finish` with the gradients of the weights."""
    tiles, data = _tiles(sizes, (sizes.d_out, sizes.d_in), how, (z.layers, delta.layers)), z.layers.data
    launch(
        weight_gradient_kernel,
        (sizes.layers * triton.cdiv(sizes.d_out, tiles.rows) * triton.cdiv(sizes.d_in, tiles.columns),),
        data,
        z.layers,
        delta.layers,
        *_descriptors(tiles, (z, tiles.depth, tiles.columns), (delta, tiles.depth, tiles.rows)),
        upstream,
        to,
        numbers_of_layers(numbers, how.accumulate, data.device),
        *sizes[1:],
        how.product,
        FINISH=finish,
        PHI=phi,
        **_options(tiles, z.layers, delta.layers, *_layers_in(to)),
    )


def launch_bias_gradient(
    sizes: Sizes, delta: Layers, upstream: Layers | None, to: Any, how: Arithmetic, finish: Any = store_gradient
) -> None:
    """`finish` with the gradients of the biases."""
    launch(
        bias_gradient_kernel,
        (sizes.layers * triton.cdiv(sizes.d_out, BLOCK_O.value),),
        delta.data,
        delta,
        upstream,
        to,
        sizes.samples,
        sizes.d_out,
        how.product,
        FINISH=finish,
        num_warps=4,
    )


def tile_descriptor(operand: Operand, rows: int, columns: int) -> TensorDescriptor | None:
    """For loads of tiles (rows, columns) of an operand; None of layers that are not aligned, not row by row, or not
    equally far apart: their tiles are loaded by pointers.

    It is made on the host and goes to the kernel by value: it needs no memory on the device, and a CUDA graph keeps it.
    """
    layers, batch = operand
    if batch is None or batch.numel() == 0 or batch.stride(2) != 1 or layers.align.value == 1:
        return None
    n_layers, n_rows, n_columns = batch.shape
    row = batch.stride(1)
    apart = batch.stride(0) if n_layers > 1 else n_rows * row
    if row < n_columns or apart < n_rows * row or apart % row != 0 or max(batch.shape) > INT32_MAX:
        return None  # CUDA documents strides that are multiples of one another, and rows and layers that do not overlap
    return TensorDescriptor(batch, [n_layers, n_rows, n_columns], [apart, row, 1], [1, rows, columns])


def _descriptors(tiles: LinearTiles, *operands: tuple[Operand, int, int]) -> list[TensorDescriptor | None]:
    """Of each operand, with the rows and columns of its tiles."""
    return [tile_descriptor(*operand) if tiles.descriptors else None for operand in operands]


def _layers_in(to: Any) -> tuple[Layers, ...]:
    """What a FINISH writes to: layers, or a tuple with some."""
    return (to,) if isinstance(to, Layers) else tuple(x for x in to if isinstance(x, Layers))


def _tiles(
    sizes: Sizes,
    product: tuple[int, int],
    how: Arithmetic,
    operands: Sequence[Layers],
    others: Sequence[Layers | None] = (),
) -> LinearTiles:
    widest = max(x.data.element_size() for x in operands)
    even = sizes.d_in % 16 == sizes.d_out % 16 == 0
    even = even and all(x is None or x.align.value > 1 for x in (*operands, *others))
    return linear_tiles(*product, widest, how.precision, architecture_of(operands[0].data.device), even)


def _options(tiles: LinearTiles, *layers: Layers | None) -> dict[str, Any]:
    return {
        # whether offsets within a layer need 64 bits; beyond its end lies at most a tile
        "WIDE": max(extent(x.data) for x in layers if x is not None) > INT32_MAX - 2**20,
        "PARTS": tiles.parts,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.depth,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "maxnreg": tiles.registers,
    }
