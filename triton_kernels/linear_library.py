"""The launches of linear_launches.py with products by the library (cuBLAS), where its main loop is worth more than the
detour of a product through memory: it is written in the accumulation type, and a kernel of its own reads it and does
what the epilogue does otherwise. Results are the same to rounding; the bits of a batched product depend on the number
of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import IDENTITY
from .common import INT32_MAX, extent, launch
from .layers import (
    BRANCH_SCALE,
    NUMBERS,
    LayerNumbers,
    Layers,
    ResidualIo,
    load_layers,
    numbers_of_layers,
    size_of,
    stack_layers,
    triton_dtype,
)
from .linear_kernels import finish_input, judge_products, tile_of_program, upstream_of
from .linear_launches import Sizes
from .linear_tiles import Arithmetic
from .local_residual import residual_tiles
from .operands import store_operands

# From this width on. The detour is 8 bytes an element. On an H200 it takes 744 / width times as long as a product of
# 16-bit operands, and 46 / width times as long as one in exact float32 (counted, not measured: at 4.3 TB/s, and at 800
# and 50 TFLOP/s): it should be a fifth at most, or less than what tiles without tensor cores lose.
WIDTHS = {"half": 4096, "tf32": 4096, "ieee": 256}


def takes_library(sizes: Sizes, precision: str) -> bool:
    """Whether products of such layers are the library's; not in float64, whose bits must not depend on the depth."""
    least = WIDTHS.get(precision)
    return least is not None and min(sizes.samples, sizes.d_in, sizes.d_out) >= least


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def load_products(products, layer, rows, columns, n_rows, n_columns, ACC: tl.constexpr):
    """A tile (BLOCK_M, BLOCK_N)."""
    mask = (rows < n_rows)[:, None] & (columns < size_of(products, n_rows, n_columns, True))[None, :]
    return load_layers(products, layer, rows, columns, mask, ACC)


@triton.jit
def judge_kernel(
    products, bias, io, numbers, partial, n_samples, d_out, ACC: tl.constexpr, ACTIVATION: tl.constexpr,
    LOSS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What forward_kernel does with a tile of its product."""
    layer, rows, columns = tile_of_program(n_samples, d_out, BLOCK_M, BLOCK_N, WIDE)
    tile = load_products(products, layer, rows, columns, n_samples, d_out, ACC)
    energy = judge_products(
        tile, bias, io, numbers + NUMBERS * layer, layer, rows, columns, n_samples, d_out, ACTIVATION, LOSS, 1
    )  # fmt: skip
    tl.store(partial + tl.program_id(0), energy)


@triton.jit
def finish_input_kernel(
    products, z, q, to, numbers, n_samples, d_in, ACC: tl.constexpr, FINISH: tl.constexpr, PHI: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What input_gradient_kernel does with a tile of its product."""
    layer, rows, columns = tile_of_program(n_samples, d_in, BLOCK_M, BLOCK_N, WIDE)
    tile = load_products(products, layer, rows, columns, n_samples, d_in, ACC)
    finish_input(
        FINISH, to, tile, z, q, None, numbers + NUMBERS * layer, layer, rows, columns, n_samples, d_in, PHI, 1
    )  # fmt: skip


@triton.jit
def finish_weight_kernel(
    products, upstream, to, numbers, d_out, d_in, ACC: tl.constexpr, FINISH: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What weight_gradient_kernel does with a tile of its product."""
    layer, rows, columns = tile_of_program(d_out, d_in, BLOCK_M, BLOCK_N, WIDE)
    scale = tl.load(numbers + NUMBERS * layer + BRANCH_SCALE) * upstream_of(upstream, layer, ACC)
    tile = load_products(products, layer, rows, columns, d_out, d_in, ACC) * scale
    mask = (rows < d_out)[:, None] & (columns < size_of(products, d_out, d_in, True))[None, :]
    FINISH(to, layer, rows, columns, mask, tile)


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


def launch_forward(
    z: Tensor,
    weight: Tensor,
    bias: Layers | None,
    io: ResidualIo,
    numbers: Sequence[LayerNumbers],
    how: Arithmetic,
    phi: int,
    f: int,
    hidden_loss: int,
) -> Tensor:
    """Store what `io` wants; the energies (L, tiles) of the tiles. z: (L, n, d_in); weight: (L, d_out, d_in)."""
    products = _product(_operand(z, how, phi), weight.mT, how)
    n_layers, n_samples, d_out = products.shape
    of_products, options = _tiled(products, how, (bias, *io))
    n_tiles = triton.cdiv(n_samples, options["BLOCK_M"]) * triton.cdiv(d_out, options["BLOCK_N"])
    partial = products.new_empty(n_layers, n_tiles)
    launch(
        judge_kernel,
        (partial.numel(),),
        products,
        of_products,
        bias,
        io,
        numbers_of_layers(numbers, how.accumulate, z.device),
        partial,
        n_samples,
        d_out,
        ACTIVATION=f,
        LOSS=hidden_loss,
        **options,
    )
    return partial


def launch_input_gradient(
    delta: Tensor,
    weight: Tensor,
    z: Layers,
    q: Layers | None,
    to: Any,
    numbers: Sequence[LayerNumbers],
    how: Arithmetic,
    phi: int,
    finish: Any,
) -> None:
    """`finish` with the gradients of z. delta: (L, n, d_out)."""
    products = _product(delta, weight, how)
    _launch_finish(
        finish_input_kernel,
        products,
        (z, q, to, numbers_of_layers(numbers, how.accumulate, delta.device)),
        how,
        (z, q, *to),
        FINISH=finish,
        PHI=phi,
    )


def launch_weight_gradient(
    z: Tensor,
    delta: Tensor,
    upstream: Layers | None,
    to: Any,
    numbers: Sequence[LayerNumbers],
    how: Arithmetic,
    phi: int,
    finish: Any,
) -> None:
    """`finish` with the gradients of the weights."""
    products = _product(delta.mT, _operand(z, how, phi), how)
    on_device = numbers_of_layers(numbers, how.accumulate, z.device)
    _launch_finish(finish_weight_kernel, products, (upstream, to, on_device), how, to, FINISH=finish)


def _launch_finish(
    kernel: Any, products: Tensor, args: tuple, how: Arithmetic, layers: Sequence, **options: Any
) -> None:
    n_layers, n_rows, n_columns = products.shape
    of_products, tiled = _tiled(products, how, layers)
    n_tiles = triton.cdiv(n_rows, tiled["BLOCK_M"]) * triton.cdiv(n_columns, tiled["BLOCK_N"])
    launch(kernel, (n_layers * n_tiles,), products, of_products, *args, n_rows, n_columns, **options, **tiled)


def _tiled(products: Tensor, how: Arithmetic, others: Sequence) -> tuple[Layers, dict[str, Any]]:
    """(products (L, rows, columns) as layers, the options of a kernel over their elements)."""
    n_layers, n_rows, n_columns = products.shape
    tiles = residual_tiles(n_rows, n_columns, how.accumulate)
    layers = stack_layers(products, tuple(range(n_layers)))
    largest = max(extent(x.data) for x in (layers, *others) if isinstance(x, Layers))
    return layers, {
        "ACC": triton_dtype(how.accumulate),
        "WIDE": largest > INT32_MAX - 2**20,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "num_warps": tiles.num_warps,
    }


def _operand(z: Tensor, how: Arithmetic, phi: int) -> Tensor:
    """phi(z) (L, n, d), as the library multiplies it."""
    if phi == IDENTITY.value and z.dtype == how.rounded:
        return z
    made, chosen = z.new_empty(z.shape, dtype=how.rounded), tuple(range(len(z)))
    store_operands(stack_layers(z, chosen), stack_layers(made, chosen), len(z), how, phi)
    return made


def _product(a: Tensor, b: Tensor, how: Arithmetic) -> Tensor:
    """a b (L, rows, columns) in the accumulation type."""
    if a.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return torch.bmm(a, b, **({} if how.rounded == how.accumulate else {"out_dtype": how.accumulate}))
    return torch.bmm(a.to(how.accumulate), b.to(how.accumulate))
