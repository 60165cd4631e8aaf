"""local_residual in Triton: from the raw logits of layers to energies, residuals and gradients, element by element.

`local_residual` has the signature and the results of `reference/local_residual.py`, which says what it computes. A
program has one tile (BLOCK_R, BLOCK_C) of one layer; layers whose rows lie one after the other are one long row. The
energies of tiles are added up in a second launch, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INT32_MAX, extent, launch
from .layers import (
    NUMBERS,
    LayerNumbers,
    ResidualIo,
    accumulation_dtype,
    grouped,
    judge,
    load_layers,
    numbers_of_layers,
    size_of,
    stack_layers,
    sum_energy,
    triton_dtype,
)

OPS = ("local_residual",)


@dataclass(frozen=True)
class ResidualTiles:
    """How a kernel over the elements of layers is cut."""

    rows: int
    columns: int
    num_warps: int


def residual_tiles(rows: int, columns: int, dtype: torch.dtype) -> ResidualTiles:
    """The tiles of layers (rows, columns). Up to four tensors are in registers at a time: 8 elements of each for a
    thread, a load of 16 bytes where they have 16 bits, and 4 in float64."""
    elements = 512 if dtype == torch.float64 else 1024
    # side by side: 512 elements, at least 1 KB
    block_columns = min(triton.next_power_of_2(max(columns, 1)), elements if rows == 1 else 512)
    block_rows = min(triton.next_power_of_2(max(rows, 1)), elements // block_columns)
    return ResidualTiles(block_rows, block_columns, num_warps=max(4 * block_rows * block_columns // elements, 1))


@triton.jit
def local_residual_kernel(
    logits,
    io,
    numbers,
    partial,
    n_rows,
    n_columns,
    ACTIVATION: tl.constexpr,
    LOSS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Whatever is wanted for one tile of one layer, and its energy."""
    n_columns = size_of(logits, n_rows, n_columns, True)
    column_tiles = tl.cdiv(n_columns, BLOCK_C)
    n_tiles = column_tiles * tl.cdiv(n_rows, BLOCK_R)
    layer, tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    row_tile, column_tile = tile // column_tiles, tile % column_tiles
    if WIDE:
        row_tile, column_tile = row_tile.to(tl.int64), column_tile.to(tl.int64)
    rows = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = column_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    a = load_layers(logits, layer, rows, columns, mask, ACC)  # (BLOCK_R, BLOCK_C)
    energy = judge(a, io, numbers + NUMBERS * layer, layer, rows, columns, mask, ACTIVATION, LOSS)
    tl.store(partial + tl.program_id(0), energy)


def _check(logits: Tensor, others: dict[str, Tensor | None], skip: Sequence[float]) -> None:
    """No kernel may read beyond its arguments, whoever calls the op."""
    if logits.dim() != 3:
        raise ValueError(f"logits: expected shape (T, n, d), got {tuple(logits.shape)}")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logits.shape:
            raise ValueError(f"{name}: expected shape {tuple(logits.shape)}, got {tuple(tensor.shape)}")
    if len(skip) != len(logits):
        raise ValueError(f"skip: has {len(skip)} values, but there are {len(logits)} layers")
    if others["skip_input"] is None and any(skip):
        raise ValueError(f"skip_input: is needed where skip is not 0, got skip {list(skip)}")


def local_residual(
    logits: Tensor,
    target: Tensor,
    multiplier: Tensor | None,
    skip_input: Tensor | None,
    activation: list[int],
    hidden_loss: int,
    kappa: float,
    rho: list[float],
    skip: list[float],
    dual_step: list[float],
    need_residual: bool,
    need_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy (T,) of every layer; on request its residual e; on request delta and q, each (T, n, d)."""
    inputs = {"target": target, "multiplier": multiplier, "skip_input": skip_input}
    _check(logits, inputs, skip)
    accumulate = accumulation_dtype(logits.dtype)
    energy = logits.new_empty(len(logits), dtype=accumulate)
    wanted = {"residual": need_residual, "delta": need_gradient, "q": need_gradient}
    made = {name: logits.new_empty(logits.shape if want else (0,)) for name, want in wanted.items()}
    stacks = {"logits": logits, **inputs, **{name: made[name] if want else None for name, want in wanted.items()}}
    rows, columns = logits.shape[1:]
    if all(x is None or x[0].is_contiguous() for x in stacks.values() if len(logits)):
        rows, columns = 1, rows * columns
        stacks = {name: x if x is None else x.flatten(1).unsqueeze(1) for name, x in stacks.items()}
    tiles = residual_tiles(rows, columns, logits.dtype)
    n_tiles = triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)
    for chosen in grouped(activation):
        of_logits, *io = (
            stack_layers(x if name != "skip_input" or any(skip[t] for t in chosen) else None, chosen)
            for name, x in stacks.items()
        )
        numbers = [LayerNumbers(rho[t], skip[t], 1.0, dual_step[t], kappa) for t in chosen]
        partial = logits.new_empty(len(chosen), n_tiles, dtype=accumulate)
        launch(
            local_residual_kernel,
            (len(chosen) * n_tiles,),
            logits,
            of_logits,
            ResidualIo(*io),
            numbers_of_layers(numbers, accumulate, logits.device),
            partial,
            rows,
            columns,
            ACTIVATION=activation[chosen[0]],
            LOSS=hidden_loss,
            ACC=triton_dtype(accumulate),
            WIDE=max(extent(x[0]) for x in stacks.values() if x is not None) > INT32_MAX - 2**20,
            BLOCK_R=tiles.rows,
            BLOCK_C=tiles.columns,
            num_warps=tiles.num_warps,
        )
        sum_energy(partial, energy, chosen)
    return energy, *made.values()
