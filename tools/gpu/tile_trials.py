"""What `make tune` tries: tiles for the products of one class, in steps of training of several sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol
from unittest import mock

from bench.peers import Expected, Outputs, Problem, decoupled_step, prepare
from bench.workloads import DecoupledStepWorkload
from lgd_kernels.triton_kernels import linear_launches
from lgd_kernels.triton_kernels.linear_tiles import MOST_REGISTERS, counted_tiles
from lgd_kernels.triton_kernels.tile_table import LinearTiles, ProductClass, product_class
from tools.gates.triton_ahead_of_time import compile_variant
from tools.gates.triton_layers import SHARED_MEMORY, float32_as, variants_of

Call = Callable[[], Outputs]
TF32_EPS = 2.0**-10
REGISTERS = {4: 168, 8: 128}  # of a thread, by warps: for 3 programs at a time, or 2


class Size(NamedTuple):
    """Of a net of layers of one width; precision: that of `linear_tiles`."""

    precision: str
    depth: int
    width: int
    n_samples: int


# The sizes that `python -m bench` has goals for, and smaller ones. What matters most first: a run may be stopped.
SIZES = (
    Size("half", 32, 256, 256),
    Size("half", 32, 1024, 1024),
    Size("half", 32, 128, 64),
    Size("half", 32, 128, 1024),
    Size("half", 32, 64, 64),
    Size("tf32", 32, 256, 256),
    Size("tf32", 32, 1024, 1024),
    Size("tf32", 32, 128, 64),
    Size("ieee", 32, 128, 64),
    Size("ieee", 32, 64, 64),
)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


def candidates(product: ProductClass) -> list[LinearTiles]:
    """The tiles that are tried: those that are counted, the same without descriptors, and others of the same depth that
    fit into shared memory and have 32 to 128 numbers of the product for a thread."""
    counted = counted_tiles(**dataclasses.asdict(product))
    tried = [counted, dataclasses.replace(counted, descriptors=False)]
    stages = (counted.num_stages, counted.num_stages + 1)
    for rows, columns, num_warps, num_stages in itertools.product((64, 128), (32, 64, 128, 256), (4, 8), stages):
        numbers = rows * columns // (32 * num_warps)
        staged = num_stages * counted.depth * (rows + columns) * product.widest
        beyond = rows > max(product.rows, 64) or columns > max(product.columns, 32)
        if beyond or not 32 <= numbers <= 128 or staged > SHARED_MEMORY[product.architecture]:
            continue
        if num_warps == 8 and rows == 64:  # a group of 4 warps multiplies 64 rows
            continue
        registers = REGISTERS[num_warps] if numbers < 128 and product.even else MOST_REGISTERS
        how = (min(numbers // 8, 8), num_warps, num_stages, registers, counted.descriptors)
        tried.append(LinearTiles(rows, columns, counted.depth, *how))
    return list(dict.fromkeys(tried))


@contextlib.contextmanager
def with_tiles(chosen: dict[ProductClass, LinearTiles]) -> Iterator[list[ProductClass]]:
    """Within the block products of these classes have these tiles, and others those that are counted. Lists the classes
    of all products that tiles were asked for."""
    asked: list[ProductClass] = []

    def instead(*how) -> LinearTiles:
        asked.append(product_class(*how))
        return chosen.get(asked[-1]) or counted_tiles(*how)

    with mock.patch.object(linear_launches, "linear_tiles", instead):
        yield asked


def why_refused(product: ProductClass, tiles: LinearTiles) -> str | None:
    """What the gate would say about the kernels of such products with these tiles; None if nothing."""
    with with_tiles({product: tiles}):
        for variant in variants_of(product):
            try:
                report, _ = compile_variant(variant)
            except Exception as error:  # the assembler may find too few registers
                return f"{variant.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if report.stack:
                return f"{variant.name}: spills, {report.stack} bytes of stack"
            if complaints := list(variant.complaints(report)):
                return f"{variant.name}: {', '.join(complaints)}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


class Steps(Protocol):
    """Steps of training of one size. label: what they are."""

    label: str

    def products(self) -> list[ProductClass]:
        """The classes of the products of a step."""

    def problem(self, product: ProductClass, tried: Iterable[LinearTiles]) -> Problem:
        """The same step with each of the tiles for products of this class: a call for each, under `name_of(tiles)`."""


class StepsOfBenchmark:
    """Those of `python -m bench`, by Triton's kernels."""

    def __init__(self, size: Size, device: str = "cuda"):
        dtype = "bfloat16" if size.precision == "half" else "float32"
        self._size = size
        self._workload = DecoupledStepWorkload(size.depth, size.width, size.n_samples, dtype, peers=(), device=device)
        self.label = f"{self._workload.label} ({size.precision})"

    def products(self) -> list[ProductClass]:
        with with_tiles({}) as asked, float32_as(self._size.precision):
            self._step()()
        return list(dict.fromkeys(asked))

    def problem(self, product: ProductClass, tried: Iterable[LinearTiles]) -> Problem:
        calls = {name_of(tiles): self._with({product: tiles}, self._step()) for tiles in tried}
        return dataclasses.replace(prepare(self._workload), calls=calls, expected=lambda: self._expected)

    def _step(self) -> Call:
        return decoupled_step.decoupled_by_us(decoupled_step.make_state(self._workload), "triton")

    def _with(self, chosen: dict[ProductClass, LinearTiles], step: Call) -> Call:
        def call() -> Outputs:
            with with_tiles(chosen), float32_as(self._size.precision):
                return step()

        return call

    @functools.cached_property
    def _expected(self) -> dict[str, Expected]:
        expected = decoupled_step.expected_outputs(self._workload)
        if self._size.precision != "tf32":
            return expected
        rounding = min(TF32_EPS * self._size.depth * self._size.width**0.5, 0.05)  # as there for other dtypes
        return {name: dataclasses.replace(x, tolerance=x.tolerance + rounding) for name, x in expected.items()}


def name_of(tiles: LinearTiles) -> str:
    """In one line."""
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(tiles).items())
