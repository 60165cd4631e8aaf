"""Tiles that were measured: tiles/sm_90.json and its like, one file for each architecture, which `make tune` writes on
a machine that has it. Nothing is measured at run time, so that all ranks and all runs have the same tiles, and the same
bits."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

FOLDER = Path(__file__).with_name("tiles")
SMALLEST, LARGEST = 32, 1024  # classes of sizes
PRECISIONS = ("half", "tf32", "ieee", "float64")


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
    descriptors: bool  # whether tiles of operands are loaded by tensor descriptors, where the operands can have them


@dataclass(frozen=True)
class ProductClass:
    """Products that have the same tiles: the arguments of `linear_tiles`, sizes rounded up to powers of 2.

    The number of layers is not among them: the bits of a layer must not depend on the others."""

    rows: int
    columns: int
    widest: int
    precision: str
    architecture: int
    even: bool


def product_class(
    rows: int, columns: int, widest: int, precision: str, architecture: int, even: bool = True
) -> ProductClass:
    """The class of the products that `linear_tiles` is asked about with these arguments."""
    rows, columns = (min(max(triton.next_power_of_2(size), SMALLEST), LARGEST) for size in (rows, columns))
    return ProductClass(rows, columns, widest, precision, architecture, even)


@dataclass(frozen=True)
class Entry:
    """The fastest tiles of a class of products.

    step: the step of training that was timed, all of it. median_ms: its time with these tiles; default_ms: with those
    that are counted. error: of its results, relative to float64.
    """

    product: ProductClass
    tiles: LinearTiles
    step: str
    median_ms: float
    default_ms: float
    error: float


@dataclass(frozen=True)
class Table:
    """What a file holds: entries, and what they were measured on and with."""

    device: str
    torch: str
    triton: str
    commit: str
    entries: list[Entry]


def path_of(architecture: int) -> Path:
    return FOLDER / f"sm_{architecture}.json"


@functools.cache
def measured_tiles(architecture: int) -> dict[ProductClass, LinearTiles]:
    """By class of product; empty where nothing was measured. Read once: what a process has seen, it keeps."""
    path = path_of(architecture)
    return {entry.product: entry.tiles for entry in read_table(path).entries} if path.exists() else {}


def read_table(path: Path) -> Table:
    """Raises ValueError, with the file and the field, where it is not what `write_table` writes."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor text
        raise ValueError(f"{path}: expected JSON: {error}") from None
    table = _parsed(Table, values, f"{path}: table")
    for i, entry in enumerate(table.entries):
        product, where = entry.product, f"{path}: table.entries[{i}].product"
        if product.precision not in PRECISIONS:
            raise ValueError(f"{where}.precision: expected one of {PRECISIONS}, got {product.precision!r}")
        if (nearest := product_class(**dataclasses.asdict(product))) != product:
            raise ValueError(f"{where}: expected a class as {nearest}, got {product}")
    return table


def write_table(path: Path, table: Table) -> None:
    """Put the table in place of the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(table), indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def _parsed(kind: Any, value: object, where: str) -> Any:
    """A value of JSON as one of the dataclasses above, a list of one, or a plain value of this type."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        return [_parsed(*typing.get_args(kind), element, f"{where}[{i}]") for i, element in enumerate(value)]
    if dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != fields.keys():
            given = list(value) if isinstance(value, dict) else repr(value)
            raise ValueError(f"{where}: expected the fields {list(fields)}, got {given}")
        return kind(**{name: _parsed(fields[name], value[name], f"{where}.{name}") for name in fields})
    if type(value) is not kind or (kind is int and value <= 0):
        raise ValueError(f"{where}: expected {'a positive ' if kind is int else ''}{kind.__name__}, got {value!r}")
    return value
