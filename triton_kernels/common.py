"""What the kernels share: how tensors are described to them, the sizes of their tiles, and how they are launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run in Python, on tensors of the CPU
INT32_MAX = 2**31 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Tensors as the kernels take them. What is None takes its branch of the kernel with it when that is compiled.
# ---------------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A tensor (O, C, I) of any strides, which count elements."""

    data: Tensor
    outer: int
    classes: int
    inner: int


class PerRow(NamedTuple):
    """An element for every row, in the order of the rows."""

    data: Tensor
    stride: int


def rows(tensor: Tensor | None, swapped: bool = False) -> Rows | None:
    """A tensor (O, C, I) for a kernel; with O and I swapped if the one row of I positions makes that a mere name."""
    if tensor is None:
        return None
    outer, classes, inner = tensor.stride()
    return Rows(tensor, inner, classes, outer) if swapped else Rows(tensor, outer, classes, inner)


def per_row(tensor: Tensor | None) -> PerRow | None:
    """A tensor (O, I) for a kernel. Flattening copies only where no single stride leads from row to row."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    return PerRow(flat, flat.stride(0))


def extent(tensor: Tensor | None) -> int:
    """The largest offset of an element, in elements."""
    if tensor is None:
        return 0
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """How a kernel over rows is cut: a program has `rows` rows, which it sees in tiles of (rows, classes)."""

    rows: int
    classes: int
    whole: bool  # one tile holds all classes and stays on chip; otherwise rows are read twice
    num_warps: int


def tiles_for(classes: int, inner: int, dtype: torch.dtype, architecture: int, kept: int = 1) -> Tiles:
    """The tiles for rows of so many classes.

    inner: 1 if the classes of a row lie side by side, otherwise the number of rows that do. Only whether it is 1
        counts, and the number of rows does not: the bits of a row must not depend on the others.
    dtype: of the logits. architecture: 90 for compute capability 9.0.
    kept: 1, 2 or 4: how much a program holds in registers, as a multiple of a tile of logits.
    """
    numbers = 32 // kept // (2 if dtype == torch.float64 else 1)  # of a tile, for a thread: 32 registers in all
    largest = 1024 * numbers
    block = triton.next_power_of_2(max(classes, 1))
    if inner > 1:
        # side by side: 32 bytes, what memory moves at once, or more
        rows, whole = max(1024 // block, 16), block * 32 <= largest
        if not whole:
            numbers = max(numbers // 2, 8)
            rows, block = 32, 8 * numbers
    elif block < 256:
        # a thread has a number of each of several rows, and all that belongs to those rows: 4, not more
        rows, whole, numbers = 512 // block, True, 4
    else:
        rows, whole = 1, block <= largest
        if not whole:
            # A block of 32 warps has a multiprocessor that can hold 64 to itself, because of its registers: so few rows
            # are under way that the second read finds them in the L2 cache. Others hold 48 warps, 3 blocks of 16.
            block = largest // 2 if architecture in (80, 90, 100) else largest // 4
            numbers //= 2
        numbers = max(numbers, 8)  # two loads of 16 bytes or more, and room for all that belongs to the row
    return Tiles(rows, block, whole, num_warps=max(rows * block // (32 * numbers), 1))


def alignment(element_size: int, *multiples: int) -> int:
    """How many elements the compiler may take to be aligned together: those of 16 bytes, if all these numbers are
    multiples of that, otherwise 1. Nothing between: then the bits of a row would depend on where the tensor starts."""
    vector = 16 // element_size
    return vector if all(number % vector == 0 for number in multiples) else 1


@functools.cache
def architecture_of(device: torch.device) -> int:
    """90 for compute capability 9.0, which is also what the interpreter plays."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel on the current stream of the tensor's device, unless there is nothing to do."""
    if all(grid):
        with torch.cuda.device_of(like):
            kernel[grid](*args, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def multiple(number, ALIGN: tl.constexpr):
    """number, a multiple of ALIGN, so that the compiler knows: it knows by itself of multiples of 16 only, and
    rows of 1000 elements can be read 16 bytes at a time too."""
    return number // ALIGN * ALIGN


@triton.jit
def rows_at(tensor, outer, inner, ALIGN: tl.constexpr, LANES: tl.constexpr):
    """The address of class 0 of each row in a `Rows`, (BLOCK_R,)."""
    if LANES:
        return tensor.data + outer * multiple(tensor.outer, ALIGN) + inner * tensor.inner
    else:
        return tensor.data + outer * multiple(tensor.outer, ALIGN) + inner * multiple(tensor.inner, ALIGN)


@triton.jit
def to_classes(tensor, classes, ALIGN: tl.constexpr, LANES: tl.constexpr):
    """How far it is from class 0 of a row to the classes, in the shape of `classes`."""
    if LANES:
        return classes * multiple(tensor.classes, ALIGN)
    else:
        return classes * tensor.classes


@triton.jit
def add(total, lost, term):
    """total + term, and what was lost in the sum, for the next one (Kahan): tiles of equal terms are all rounded alike,
    and thousands of them would add up their errors. Of an infinite sum nothing is lost."""
    term = term - lost
    new = total + term
    return new, tl.where(tl.abs(new) == float("inf"), 0, (new - total) - term)
