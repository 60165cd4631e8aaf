"""The Triton kernels compiled ahead of time, without a GPU: registers, spills, shared memory, 16-byte loads and stores,
instructions of tensor cores. Those of the layer ops are in triton_layers.py.

A kernel is compiled for what its op would launch: the op runs on meta tensors, its launches are recorded instead of
done, and Triton specializes on their arguments as it would on a device. What comes out is compared with
`triton_budget.json`; `python -m tools.gates.triton_ahead_of_time` writes that file anew.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from tools.gates.common import GateError, run
from tools.gates.triton_launches import recorded
from tools.gates.triton_layers import LayerVariant, layer_variants

BUDGET = Path(__file__).with_name("triton_budget.json")
ARCHITECTURES = (80, 90, 100)
DTYPES = ("float32", "bfloat16", "float16", "float64")
KINDS = ("identity", "diagonal", "label_smoothing", "background", "sparse", "sparse_background", "dense_float32")
KINDS += ("dense_bfloat16", "dense_with_diagonal", "dense_with_stored_values")
OPS = ("loss", "forward", "everything", "backward", "backward_", "double_backward")
# (O, C, I): short rows, rows in several sizes of tile, rows read twice, columns that stay on chip and that do not
SHAPES = {
    "short": (4096, 10, 1),
    "row": (1024, 1000, 1),
    "long": (64, 32768, 1),
    "twice": (64, 131072, 1),
    "columns": (8, 24, 4096),
    "tall_columns": (8, 1000, 1024),
    "twice_columns": (8, 4096, 1024),
}
_WIDE_LOAD = re.compile(r"ld\.global\S*\.(v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global [^;]*, 0x10")
_TENSOR_CORES = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
_TILE_LOAD = "cp.async.bulk.tensor"
_WIDE_STORE = re.compile(r"st\.global\S*\.(v4\.b32|v2\.b64)")


class Variant(NamedTuple):
    """One kernel to compile."""

    op: str
    kind: str
    dtype: str
    shape: str
    architecture: int

    @property
    def name(self) -> str:
        return f"{self.op} {self.kind} {self.dtype} {self.shape} sm_{self.architecture}"

    def launch(self) -> tuple:
        """(kernel, arguments, options) of the last kernel that the op launches."""
        from lgd_kernels.triton_kernels import softmax_infogain as module

        with recorded(self.architecture, module) as launches:
            _call(self)(module)
        return launches[-1]

    def complaints(self, report: Report) -> Iterator[str]:
        """What is wrong with a kernel that does not spill and is within its budget."""
        if SHAPES[self.shape][2] == 1 and self.shape != "short" and self.op != "backward_matrix":
            if not report.wide_loads:
                yield "no load of 16 bytes"
            if self.op != "loss" and not report.wide_stores:
                yield "no store of 16 bytes"


AnyVariant = Variant | LayerVariant


class Report(NamedTuple):
    """What the compiler made of a kernel; bytes."""

    registers: int
    stack: int
    shared: int
    threads: int
    wide_loads: int
    wide_stores: int
    tile_loads: int  # by descriptors
    tensor_cores: str  # the instruction that multiplies matrices


def variants() -> list[AnyVariant]:
    """What the gate compiles: for every architecture the gradient with every kind of H and dtype, and every op on every
    shape; more combinations for one architecture."""
    every, shapes = itertools.product(ARCHITECTURES, KINDS, DTYPES), itertools.product(ARCHITECTURES, OPS, SHAPES)
    chosen = [Variant("forward", kind, dtype, "row", architecture) for architecture, kind, dtype in every]
    chosen += [Variant(op, "identity", "bfloat16", shape, architecture) for architecture, op, shape in shapes]
    chosen += [Variant("forward", "identity", dtype, shape, 90) for dtype, shape in itertools.product(DTYPES, SHAPES)]
    chosen += [Variant("forward", kind, "bfloat16", shape, 90) for kind, shape in itertools.product(KINDS, SHAPES)]
    chosen += [Variant("double_backward", kind, dtype, "row", 90) for kind, dtype in itertools.product(KINDS, DTYPES)]
    chosen += [Variant("everything", kind, "float32", "row", 90) for kind in KINDS]
    chosen += [Variant("backward_matrix", "dense_float32", dtype, "row", 90) for dtype in DTYPES]
    chosen = [v for v in chosen if not (v.kind.startswith("dense") and SHAPES[v.shape][1] > 2**16)]
    return list(dict.fromkeys([*chosen, *layer_variants()]))


# ---------------------------------------------------------------------------------------------------------------------
# From an op to its kernels
# ---------------------------------------------------------------------------------------------------------------------


def _parts(kind: str, classes: int) -> tuple:
    """H's tensors in the order of the ops."""
    import torch

    def floats(*shape: int, dtype: torch.dtype = torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def integers(size: int):
        return torch.empty(size, dtype=torch.int64, device="meta")

    matrix, background, diagonal, stored = None, None, None, (None, None, None)
    if kind.startswith("dense"):
        matrix = floats(classes, classes, dtype=torch.bfloat16 if kind == "dense_bfloat16" else torch.float32)
    if kind in ("label_smoothing", "background", "sparse_background"):
        background = floats(dtype=torch.float64)
    if kind in ("diagonal", "dense_with_diagonal"):
        diagonal = floats(classes)
    if kind == "label_smoothing":
        diagonal = floats(dtype=torch.float64)
    if kind in ("sparse", "sparse_background", "dense_with_stored_values"):
        stored = integers(classes + 1), integers(8 * classes), floats(8 * classes)
    return matrix, background, diagonal, *stored


def _call(variant: Variant) -> Callable[[Any], object]:
    """The op as a function of the module that has it."""
    import torch

    outer, classes, inner = SHAPES[variant.shape]
    dtype = getattr(torch, variant.dtype)
    logits = torch.empty(outer, classes, inner, dtype=dtype, device="meta")
    labels = torch.empty(outer, inner, dtype=torch.int64, device="meta")
    upstream = torch.empty(
        outer, inner, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta"
    )
    rows = (logits, labels, *_parts(variant.kind, classes), -100, 0.0)
    return {
        "loss": lambda ops: ops.softmax_infogain(*rows, None, False, False),
        "forward": lambda ops: ops.softmax_infogain(*rows, upstream, False, False),
        "everything": lambda ops: ops.softmax_infogain(*rows, upstream, True, True),
        "backward": lambda ops: ops.softmax_infogain_backward(*rows, upstream, upstream),
        "backward_": lambda ops: ops.softmax_infogain_backward_(logits, upstream, *rows, upstream, None),
        "double_backward": lambda ops: ops.softmax_infogain_double_backward(*rows, upstream, upstream, logits),
        "backward_matrix": lambda ops: ops.softmax_infogain_backward_matrix(logits, labels, classes, -100, upstream),
    }[variant.op]


def compile_variant(variant: AnyVariant) -> tuple[Report, str]:
    """(what the compiler says, PTX)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, args, options = variant.launch()
    target = GPUTarget("cuda", variant.architecture, 32)
    backend = make_backend(target)
    bound, specialization, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **options
    )
    chosen, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    compiled = compile(ASTSource(kernel, signature, constants, attributes), target=target, options=chosen.__dict__)
    registers, stack = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    wide = (len(pattern.findall(ptx)) for pattern in (_WIDE_LOAD, _WIDE_STORE))
    loads = (*wide, ptx.count(_TILE_LOAD))
    tensor_cores = next((name for name in _TENSOR_CORES if name in ptx), "")
    return Report(registers, stack, compiled.metadata.shared, 32 * chosen.num_warps, *loads, tensor_cores), ptx


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack, where spills are)."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = run([tool, "--dump-resource-usage", file.name], "cuobjdump")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", output).groups()
    return int(registers), int(stack)


# ---------------------------------------------------------------------------------------------------------------------
# The gate
# ---------------------------------------------------------------------------------------------------------------------


def triton_ahead_of_time() -> None:
    """Every Triton kernel compiled for sm_80, sm_90 and sm_100: no spills, within the committed budget"""
    found, budget = _reports(variants()), json.loads(BUDGET.read_text())
    failures = [message for variant, report in found.items() for message in _failures(variant, report, budget)]
    if failures:
        raise GateError(f"{len(failures)} failures:\n" + "\n".join(failures[:40]))
    print(f"{len(found)} kernels within their budget, none spills")


def _failures(variant: AnyVariant, report: Report, budget: dict[str, list[int]]) -> Iterator[str]:
    if report.stack:
        yield f"{variant.name}: spills, {report.stack} bytes of stack"
    if variant.name not in budget:
        yield f"{variant.name}: not in {BUDGET.name}; write it anew"
        return
    registers, shared = budget[variant.name]
    if report.registers > registers or report.shared > shared:
        yield (
            f"{variant.name}: {report.registers} registers and {report.shared} bytes of shared memory, budget "
            f"{registers} and {shared}"
        )
    for complaint in variant.complaints(report):
        yield f"{variant.name}: {complaint}"


def _reports(chosen: list[AnyVariant]) -> dict[AnyVariant, Report]:
    """What the compiler says of each, by as many processes as there are cores; the cache of other runs is not used."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _use_cache, (folder,)) as pool,
    ):
        return dict(zip(chosen, pool.map(_report_of, chosen, chunksize=4), strict=True))


def _use_cache(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


def _report_of(variant: AnyVariant) -> Report:
    try:
        return compile_variant(variant)[0]
    except Exception as error:
        raise GateError(f"{variant.name}: {error}") from None


def main() -> None:
    """Write the budget: what the compiler says now."""
    found = _reports(variants())
    entries = (f'  "{v.name}": [{r.registers}, {r.shared}]' for v, r in found.items())
    BUDGET.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    failures = [message for v, r in found.items() for message in _failures(v, r, json.loads(BUDGET.read_text()))]
    print("\n".join(failures) or f"{len(found)} kernels")


if __name__ == "__main__":
    main()
