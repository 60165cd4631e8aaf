"""How the products of layers are made: in which tiles, by one table for all kernels, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl

from .common import INTERPRETED
from .layers import accumulation_dtype, triton_dtype
from .tile_table import LinearTiles, measured_tiles, product_class

MOST_REGISTERS = 255  # that a thread can have


def linear_tiles(
    rows: int, columns: int, widest: int, precision: str, architecture: int, even: bool = True
) -> LinearTiles:
    """The tiles of products (rows, columns), from the numbers alone that one layer has: those that were measured for
    products of this class, otherwise those that are counted.

    widest: bytes of an element of the widest tensor that is read for the product.
    precision: "half", "tf32", "ieee" (float32 without tensor cores) or "float64".
    architecture: 90 for compute capability 9.0.
    even: whether all that is read and written is aligned; what is not takes many registers for addresses.
    """
    how = (rows, columns, widest, precision, architecture, even)
    return measured_tiles(architecture).get(product_class(*how)) or counted_tiles(*how)


def counted_tiles(
    rows: int, columns: int, widest: int, precision: str, architecture: int, even: bool = True
) -> LinearTiles:
    """The tiles of `linear_tiles` where nothing was measured, from registers and shared memory."""
    if precision == "float64":
        return LinearTiles(32, 32, 16, 1, num_warps=4, num_stages=2, registers=MOST_REGISTERS, descriptors=False)
    if precision == "ieee":  # no tensor cores
        return LinearTiles(64, 64, 16, 1, num_warps=4, num_stages=2, registers=MOST_REGISTERS, descriptors=False)
    block_rows = 128 if rows > 64 else 64
    block_columns = 128 if columns > 64 else 64 if columns > 32 else 32
    largest, hopper = block_rows * block_columns == 128 * 128, architecture == 90 and widest == 2
    num_warps, registers = 4, 168  # 3 programs
    if block_rows * block_columns > 64 * 64:
        num_warps, registers = 8, 128 if hopper else MOST_REGISTERS  # 2 programs, or 1
    if largest and hopper and even:
        # 2 programs too; with 8 warps of 128 registers the step of lambda in the epilogue spills 16 bytes
        num_warps, registers = 4, MOST_REGISTERS
    numbers = block_rows * block_columns // (32 * num_warps)  # of the tile, for a thread
    deep = architecture >= 90  # before, activated operands of a product 128 bytes deep do not fit the registers
    # By a descriptor one thread asks for a whole tile: the main loop of delta W, 128 x 128 x 64 on sm_90, has 96
    # instructions instead of 186, and 13 registers instead of 50 besides its sums; all in all 253 instead of 254. Where
    # operands are activated, 128 x 32 would spill on sm_100, and larger tiles on sm_120.
    spills = architecture >= 120 or (architecture >= 100 and block_columns == 32)
    descriptors = architecture >= 90 and precision == "half" and even and not spills
    return LinearTiles(
        block_rows,
        block_columns,
        depth=(128 if deep else 64) // widest,
        parts=min(max(numbers // 8, 1), 8),
        num_warps=num_warps,
        num_stages=3 if deep else 4,
        registers=registers if even else MOST_REGISTERS,
        descriptors=descriptors,
    )


class Product(NamedTuple):
    """How the kernels multiply."""

    rounded: tl.constexpr  # to this dtype operands are rounded
    operand: tl.constexpr  # and in this one they are multiplied
    accumulated: tl.constexpr
    precision: tl.constexpr  # of `tl.dot`


@dataclass(frozen=True)
class Arithmetic:
    """What layers are computed in."""

    accumulate: torch.dtype
    rounded: torch.dtype  # of the operands of products
    precision: str  # for the table of tiles
    product: Product


def arithmetic(samples: torch.dtype, rounded: torch.dtype) -> Arithmetic:
    """For samples of a dtype, and operands of products rounded to another."""
    accumulate = accumulation_dtype(samples)
    precision = precision_of(torch.float64 if accumulate == torch.float64 else rounded)
    exact = INTERPRETED or precision == "float64"  # Triton's interpreter does not multiply bfloat16
    dtypes = (rounded, accumulate if exact else rounded, accumulate)
    of_dot = tl.constexpr("tf32" if precision == "tf32" else "ieee")
    return Arithmetic(
        accumulate, rounded, precision, Product(*(tl.constexpr(triton_dtype(dtype)) for dtype in dtypes), of_dot)
    )


def precision_of(operand: torch.dtype) -> str:
    """How products of this dtype are made; float32 on tensor cores only where torch's own products are."""
    if operand == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "float64" if operand == torch.float64 else "half"
