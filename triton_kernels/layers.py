"""What the kernels over layers share: how layers are described to them, what is made of a layer's raw logits, and the
sum of a layer's energy."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activated, hidden_loss
from .common import alignment, launch, multiple

BLOCK_P = tl.constexpr(1024)  # partial sums of an energy that are added at once
_TABLES = 4096  # that are kept


# ---------------------------------------------------------------------------------------------------------------------
# Layers as the kernels take them
# ---------------------------------------------------------------------------------------------------------------------


class Layers(NamedTuple):
    """Tensors (n, d), one for each layer, all of the same strides. Strides and offsets count elements.

    Offsets come from memory even where they are equally far apart, so that a layer is read in the same way, and its
    energy summed in the same order, wherever it starts and whatever else is in its stack."""

    align: tl.constexpr  # of so many elements the compiler may take starts, strides and lengths to be multiples
    row_major: tl.constexpr  # whether the elements of a row lie side by side, otherwise those of a column may
    data: Tensor
    offsets: Tensor  # (L,) int64, from the start of `data` to element (0, 0) of every layer
    row: int
    column: int


def table(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values on the device. Kept, so that only the first call for them copies to the device; for ever, once a CUDA
    graph has been captured that reads them."""
    made = _table(values, dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _in_graphs[id(made)] = made
    return made


_in_graphs: dict[int, Tensor] = {}


@functools.lru_cache(_TABLES)
def _table(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the host does not wait for a copy."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def _layers(first: Tensor, offsets: tuple[int, ...], apart: Sequence[int]) -> Layers:
    """Layers like `first` (n, d), (n,) or (), at these offsets, which are sums of multiples of the numbers `apart`.

    With rows of odd lengths no layer counts as aligned: its bits do not depend on whether others lie before it, which
    would push it off its place."""
    row, column = (0, 0, *first.stride())[-2:]
    row_major = column == 1 or row != 1
    align = 1
    if min(row, column) <= 1:
        start, size = first.data_ptr(), first.element_size()
        side_by_side = (1, 1, *first.shape)[-1 if row_major else -2]
        align = alignment(size, start // size, side_by_side, row if row_major else column, *apart)
    constants = (tl.constexpr(align), tl.constexpr(row_major))
    return Layers(*constants, first, table(offsets, torch.int64, first.device), row, column)


class Operand(NamedTuple):
    """Layers that products read."""

    layers: Layers
    batch: Tensor | None  # (L, n, d): the same layers, where they are equally far apart in one stack


def batch_of(stack: Tensor, positions: Sequence[int]) -> Tensor | None:
    """The layers at these positions as one tensor, where they are equally far apart."""
    apart = positions[1] - positions[0] if len(positions) > 1 else 1
    expected = range(positions[0], positions[0] + apart * len(positions), apart) if apart > 0 else ()
    return stack[positions[0] : positions[-1] + 1 : apart] if tuple(positions) == tuple(expected) else None


def stack_layers(stack: Tensor | None, chosen: tuple[int, ...]) -> Layers | None:
    """The chosen layers of a stack (T, n, d), (T, n) or (T,)."""
    if stack is None:
        return None
    stride = stack.stride(0)
    return _layers(stack[0], tuple(t * stride for t in chosen), (stride,) if len(stack) > 1 else ())


def single_layers(tensors: Sequence[Tensor | None]) -> Layers | None:
    """Layers of one dtype, device and strides; None if they are."""
    first = tensors[0]
    if first is None:
        return None
    start, size = first.data_ptr(), first.element_size()
    offsets = tuple((x.data_ptr() - start) // size for x in tensors)
    return _layers(first, offsets, offsets)


class LayerList:
    """All layers of stacks (T_i, ...), in order, of which any may be chosen. An empty list has none of any."""

    def __init__(self, stacks: Sequence[Tensor]):
        self.stacks = stacks
        self.places = [(i, position) for i, stack in enumerate(stacks) for position in range(len(stack))]
        self._like = [(stack.shape[1:], stack.stride()[1:], stack.dtype) for stack in stacks]

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, t: int) -> tuple[int, ...]:
        return self.stacks[self.places[t][0]].shape[1:]

    def key(self, t: int) -> Hashable:
        """What layers of one launch have in common."""
        return self._like[self.places[t][0]] if self.places else None

    def choose(self, chosen: Sequence[int]) -> Layers | None:
        if not self.places:
            return None
        i, position = self.places[chosen[0]]
        first = self.stacks[i][position]
        start, size = first.data_ptr(), first.element_size()
        addresses = (self._address(t) for t in chosen)
        offsets = tuple((address - start) // size for address in addresses)
        return _layers(first, offsets, offsets)

    def batch(self, chosen: Sequence[int]) -> Tensor | None:
        """The chosen layers as one tensor, where they are equally far apart in one stack."""
        stacks, positions = zip(*(self.places[t] for t in chosen), strict=True)
        return batch_of(self.stacks[stacks[0]], positions) if len(set(stacks)) == 1 else None

    def operand(self, chosen: Sequence[int]) -> Operand:
        """The chosen layers, for products."""
        return Operand(self.choose(chosen), self.batch(chosen))

    def _address(self, t: int) -> int:
        i, position = self.places[t]
        stack = self.stacks[i]
        return stack.data_ptr() + position * stack.stride(0) * stack.element_size()


def workspace(like: Tensor, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> LayerList:
    """New layers of these shapes in one piece of memory, so that the distances between them are always the same."""
    runs = [(shape, len(list(run))) for shape, run in itertools.groupby(shapes)]
    sizes = [triton.cdiv(count * rows * columns, 128) * 128 for (rows, columns), count in runs]  # 128: aligned
    memory, begin, stacks = like.new_empty(sum(sizes), dtype=dtype), 0, []
    for ((rows, columns), count), size in zip(runs, sizes, strict=True):
        stacks.append(memory[begin : begin + count * rows * columns].view(count, rows, columns))
        begin += size
    return LayerList(stacks)


@dataclass(frozen=True)
class Group:
    """Layers that one launch takes: some of one stack, or single ones of equal shapes."""

    layers: tuple[int, ...]  # counted over all stacks
    stacks: tuple[int, ...]  # the one stack, or that of every layer
    positions: tuple[int, ...] | None  # in the one stack

    def of(self, tensors: Sequence[Tensor | None]) -> Layers | None:
        """The group's layers in a list with a tensor for each stack."""
        if self.positions is None:
            return single_layers([tensors[i] for i in self.stacks])
        return stack_layers(tensors[self.stacks[0]], self.positions)

    def operand(self, tensors: Sequence[Tensor]) -> Operand:
        """The group's layers, for products."""
        batch = None if self.positions is None else batch_of(tensors[self.stacks[0]], self.positions)
        return Operand(self.of(tensors), batch)


def groups_of(lists: Sequence[Sequence[Tensor | None]], activation: Sequence[int], *per_stack: Sequence) -> list[Group]:
    """All layers, grouped by activation and, for single layers, by what else must be equal; `lists` have an entry for
    each stack, stacks in the first of them have three dimensions and single layers two."""
    keys, places = [], []
    for i, first in enumerate(lists[0]):
        single = first.dim() == 2
        like = tuple((x.shape, x.stride(), x.dtype) if x is not None else None for x in (of[i] for of in lists))
        key = (like, *(of[i] for of in per_stack)) if single else i
        for position in range(1 if single else len(first)):
            keys.append(key)
            places.append((i, None if single else position))
    if len(activation) != len(keys):
        raise ValueError(f"activation: has {len(activation)} values, but there are {len(keys)} layers")
    groups = []
    for chosen in grouped(list(zip(keys, activation, strict=True))):
        stacks, positions = zip(*(places[t] for t in chosen), strict=True)
        groups.append(Group(chosen, stacks, None if positions[0] is None else positions))
    return groups


class LayerNumbers(NamedTuple):
    """The numbers that the kernels read of a layer, in the order of the constants below."""

    rho: float = 1.0
    skip: float = 0.0
    branch_scale: float = 1.0
    dual_step: float = 0.0
    kappa: float = 1.0
    step_size: float = 0.0
    z_momentum: float = 0.0


RHO, SKIP, BRANCH_SCALE, DUAL_STEP, KAPPA, STEP_SIZE, Z_MOMENTUM = map(tl.constexpr, range(len(LayerNumbers._fields)))
NUMBERS = tl.constexpr(len(LayerNumbers._fields))


def numbers_of_layers(rows: Sequence[LayerNumbers], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(L, NUMBERS): those of every layer."""
    return table(tuple(rows), dtype, device)


def grouped(keys: Sequence[Hashable]) -> list[tuple[int, ...]]:
    """Positions of equal keys, in order."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return [tuple(group) for group in groups.values()]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def layer_at(tensor, layer):
    """The address of element (0, 0) of a layer."""
    return tensor.data + multiple(tl.load(tensor.offsets + layer), tensor.align)


@triton.jit
def within_layer(tensor, rows, columns, TRANSPOSED: tl.constexpr):
    """How far elements of a layer are from its start, in the shape of `rows` and `columns` broadcast together; of its
    transpose, if TRANSPOSED."""
    if TRANSPOSED:
        rows, columns = columns, rows
    if tensor.row_major:
        return rows * multiple(tensor.row, tensor.align) + columns * tensor.column
    else:
        return rows * tensor.row + columns * multiple(tensor.column, tensor.align)


@triton.jit
def size_of(tensor, n_rows, n_columns, COLUMNS: tl.constexpr):
    """The number of columns or rows of a tensor, in a way that the compiler knows what it is a multiple of."""
    if COLUMNS:
        return multiple(n_columns, tensor.align) if tensor.row_major else n_columns
    else:
        return n_rows if tensor.row_major else multiple(n_rows, tensor.align)


@triton.jit
def load_layers(tensor, layer, rows, columns, mask, ACC: tl.constexpr):
    """A tile of a layer, (BLOCK_R, BLOCK_C); None of None."""
    if tensor is not None:
        at = layer_at(tensor, layer) + within_layer(tensor, rows[:, None], columns[None, :], False)
        return tl.load(at, mask=mask, other=0).to(ACC)
    else:
        return None


@triton.jit
def store_layers(tensor, layer, rows, columns, mask, value):
    """Store a tile of a layer, (BLOCK_R, BLOCK_C), where it is wanted."""
    if tensor is not None:
        at = layer_at(tensor, layer) + within_layer(tensor, rows[:, None], columns[None, :], False)
        tl.store(at, value, mask=mask)


@triton.jit
def judge(logits, io, numbers, layer, rows, columns, mask, ACTIVATION: tl.constexpr, LOSS: tl.constexpr):
    """Store what is wanted of a tile of raw logits, (BLOCK_R, BLOCK_C), and return its energy.

    numbers: where those of the layer are. Every element of an input is read before the output of that place is written,
    so that both may be one tensor."""
    ACC: tl.constexpr = logits.dtype
    rho, skip = tl.load(numbers + RHO), tl.load(numbers + SKIP)
    dual_step, kappa = tl.load(numbers + DUAL_STEP), tl.load(numbers + KAPPA)
    f, slope = activated(logits, ACTIVATION)
    x = load_layers(io.skip_input, layer, rows, columns, mask, ACC)
    if x is not None:
        f = tl.where(skip == 0, f, f + skip * x)
    e = load_layers(io.target, layer, rows, columns, mask, ACC) - f
    loss, pull = hidden_loss(e, kappa, LOSS)
    change = tl.where(dual_step == 0, 0, dual_step * e)  # 0 for an infinite e too
    before = load_layers(io.multiplier, layer, rows, columns, mask, ACC)
    if before is not None:
        multiplier = before + change
        energy = rho * loss + multiplier * e
    else:
        multiplier = change
        energy = rho * loss + tl.where(dual_step == 0, 0, multiplier * e)
    store_layers(io.updated, layer, rows, columns, mask, multiplier)
    q = rho * pull + multiplier
    store_layers(io.residual, layer, rows, columns, mask, e)
    store_layers(io.q, layer, rows, columns, mask, q)
    store_layers(io.delta, layer, rows, columns, mask, -q * slope)
    return tl.sum(tl.where(mask, energy, 0))


class ResidualIo(NamedTuple):
    """What stands around the raw logits of layers; None for what is absent or not wanted."""

    target: Layers | None = None
    multiplier: Layers | None = None
    skip_input: Layers | None = None
    residual: Layers | None = None
    delta: Layers | None = None
    q: Layers | None = None
    updated: Layers | None = None  # the multipliers after their step; may be `multiplier`
    logits: Layers | None = None  # the raw logits themselves: then nothing is made of them


# ---------------------------------------------------------------------------------------------------------------------
# Energies
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def energy_kernel(partial, energy, n_partial):
    """The energy of a layer from those of its tiles, in their order."""
    layer = tl.program_id(0)
    total = tl.zeros((), tl.float64)
    for first in range(0, n_partial, BLOCK_P):
        position = first + tl.arange(0, BLOCK_P)
        values = tl.load(partial + layer.to(tl.int64) * n_partial + position, mask=position < n_partial, other=0)
        total += tl.sum(values.to(tl.float64))
    tl.store(layer_at(energy, layer), total)


def sum_energy(partial: Tensor, energy: Tensor, chosen: tuple[int, ...]) -> None:
    """Add up the energies (L, tiles) of the tiles of the chosen layers."""
    to = stack_layers(energy, chosen)
    launch(energy_kernel, (len(chosen),), partial, partial, to, partial.shape[1], num_warps=4)
