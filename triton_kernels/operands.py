"""Operands of products, made once for all tiles that read them."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import IDENTITY, activated
from .common import INT32_MAX, extent, launch
from .layers import Layers, load_layers, store_layers, triton_dtype
from .linear_kernels import tile_of_program
from .linear_tiles import Arithmetic
from .local_residual import residual_tiles


@triton.jit
def operand_kernel(
    layers,
    to,
    n_rows,
    n_columns,
    ACC: tl.constexpr,
    PHI: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """phi of a tile (BLOCK_M, BLOCK_N) of a layer, in the dtype of `to`."""
    layer, rows, columns = tile_of_program(n_rows, n_columns, BLOCK_M, BLOCK_N, WIDE)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    x = load_layers(layers, layer, rows, columns, mask, ACC)
    if PHI != IDENTITY:
        x, _slope = activated(x, PHI)
    store_layers(to, layer, rows, columns, mask, x)


def store_operands(layers: Layers, to: Layers, n_layers: int, how: Arithmetic, phi: int = IDENTITY.value) -> None:
    """phi(layers), rounded to the dtype of `to`."""
    n_rows, n_columns = to.data.shape
    tiles = residual_tiles(n_rows, n_columns, to.data.dtype)
    launch(
        operand_kernel,
        (n_layers * triton.cdiv(n_rows, tiles.rows) * triton.cdiv(n_columns, tiles.columns),),
        to.data,
        layers,
        to,
        n_rows,
        n_columns,
        ACC=triton_dtype(how.accumulate),
        PHI=phi,
        WIDE=max(extent(layers.data), extent(to.data)) > INT32_MAX - 2**20,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        num_warps=tiles.num_warps,
    )
