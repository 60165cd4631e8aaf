"""The kernels of the layer ops that the gate compiles: for every tile that their table has."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from tools.gates.triton_launches import recorded

if TYPE_CHECKING:
    from lgd_kernels.triton_kernels.tile_table import ProductClass
    from tools.gates.triton_ahead_of_time import Report

ARCHITECTURES = (80, 90, 100)
LAYERS = 8
# dtypes of z and of the weights; float32 with and without tensor cores
PRECISIONS = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "autocast": ("float32", "bfloat16"),
    "tf32": ("float32", "float32"),
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
}
# of the products of a class, by their precision and the bytes of their widest operand
OF_PRODUCTS = {
    ("half", 2): "bfloat16",
    ("half", 4): "autocast",
    ("tf32", 4): "tf32",
    ("ieee", 4): "float32",
    ("float64", 8): "float64",
}
# n, d: every tile that is counted, and what is not aligned; for tiles that were measured, n x d_in x d_out as text
SIZES = {
    "32": (64, 32),
    "64": (64, 64),
    "128": (64, 128),
    "tall_32": (512, 32),
    "tall_64": (512, 64),
    "tall": (512, 512),
    "uneven": (77, 77),
    "library": (4096, 4096),
}
# layers of another activation, and so of another launch: what is left are all, those that lie in stacks, or layers that
# are not equally far apart, which have no descriptors
ELSEWHERE = {"all": (), "without_first": (0,), "irregular": (0, 1, 4)}
TILED = tuple(size for size in SIZES if size != "library")
ONE = ("64", "tall", "uneven")  # of every kind of tile
KERNELS = ("forward", "forward_pre", "input_gradient", "weight_gradient")
# of decoupled_step_: the same kernels with more in their epilogues, and so the ones to see every tile with
STEP_KERNELS = {
    "step_forward": "forward_kernel",
    "step_of_z": "input_gradient_kernel",
    "step_of_weight": "weight_gradient_kernel",
}
# and those that go with products of the library, and around them; "rounding": of the weights
LIBRARY_KERNELS = {
    "judge_products": "judge_kernel",
    "finish_input": "finish_input_kernel",
    "finish_weight": "finish_weight_kernel",
    "rounding": "operand_kernel",
    "step_of_bias": "bias_gradient_kernel",
}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what a block has; 80: on 8.6 and 8.9 too


class LayerVariant(NamedTuple):
    """One kernel to compile."""

    kernel: str
    precision: str
    size: str
    architecture: int
    layers: str = "all"

    @property
    def name(self) -> str:
        layers = "" if self.layers == "all" else f" {self.layers}"
        return f"{self.kernel} {self.precision} {self.size} sm_{self.architecture}{layers}"

    @property
    def activation(self) -> list[int]:
        from lgd_kernels.triton_kernels.activations import GELU_TANH, TANH

        return [(TANH if t in ELSEWHERE[self.layers] else GELU_TANH).value for t in range(LAYERS)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """n, d_in, d_out."""
        if self.size in SIZES:
            n, d = SIZES[self.size]
            return n, d, d
        n, d_in, d_out = map(int, self.size.split("x"))
        return n, d_in, d_out

    @property
    def even(self) -> bool:
        """Whether rows are aligned."""
        return self.size == "apart" or all(d % 16 == 0 for d in self.shape[1:])

    @property
    def multiplies_half(self) -> bool:
        """Whether operands have 16 bits; decoupled_step_ keeps those of float16 in single precision."""
        if self.kernel not in KERNELS and self.kernel not in STEP_KERNELS:
            return False
        of_step = self.kernel in STEP_KERNELS
        return self.precision == "bfloat16" or (self.precision == "float16" and not of_step)

    @property
    def loads_tiles(self) -> bool:
        """Whether an operand is loaded by a descriptor, with the tiles that are counted."""
        half = self.multiplies_half or (self.kernel in KERNELS and self.precision == "autocast")
        if self.architecture < 90 or not self.even or self.layers == "irregular":
            return False
        return half and (self.architecture == 90 or SIZES[self.size][1] > 32)

    def launch(self) -> tuple:
        """(kernel, arguments, options)."""
        if self.kernel in STEP_KERNELS or self.kernel in LIBRARY_KERNELS:
            return _step_launch(self)
        return _residual_launch(self) if self.kernel == "local_residual" else _linear_launch(self)

    def complaints(self, report: Report) -> Iterator[str]:
        """What is wrong with a kernel that does not spill and is within its budget."""
        from lgd_kernels.triton_kernels.tile_table import measured_tiles

        if report.shared > SHARED_MEMORY[self.architecture]:
            yield f"{report.shared} bytes of shared memory"
        if self.even and not report.wide_loads and not report.tile_loads:
            yield "no load of 16 bytes"
        if self.even and not report.wide_stores and self.kernel != "step_of_bias":  # it stores 64 numbers
            yield "no store of 16 bytes"
        is_counted = self.size in SIZES and not measured_tiles(self.architecture)
        if is_counted and (report.tile_loads > 0) != self.loads_tiles:
            yield f"{report.tile_loads} loads of tiles by descriptors"
        planned = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[self.architecture]
        if self.multiplies_half and report.tensor_cores != planned:
            yield f"multiplies by {report.tensor_cores or 'scalars'}, not by {planned}"


def layer_variants() -> list[LayerVariant]:
    """local_residual on contiguous layers, on rows that lie apart and on uneven ones; the products of decoupled_step_
    with every tile in bfloat16 and with a few in float32, the others with the largest; and for one architecture all of
    them with every tile, and the largest in the dtypes that are like bfloat16 and float32 or have but one. And all that
    have the tiles that were measured."""
    from lgd_kernels.triton_kernels.tile_table import measured_tiles

    dtypes = ("float32", "bfloat16", "float16", "float64")
    of_residual = itertools.product(["local_residual"], dtypes, ("tall", "apart", "uneven"))
    of_step = [*itertools.product(STEP_KERNELS, ("bfloat16",), TILED), *itertools.product(STEP_KERNELS, ("tf32",), ONE)]
    of_products = itertools.product(KERNELS, ("bfloat16", "tf32"), ("tall",))
    others = [*itertools.product(KERNELS, ("bfloat16",), TILED), *itertools.product(KERNELS, ("tf32",), ("uneven",))]
    others += itertools.product(STEP_KERNELS, ("tf32",), TILED)
    of_library = itertools.product(LIBRARY_KERNELS, ("bfloat16",), ("library",))
    others += itertools.product(KERNELS, ("float16", "autocast", "float32", "float64"), ("tall",))
    # of the largest, where operands are in single precision, the products are the library's
    others += itertools.product(STEP_KERNELS, ("float16", "float32", "float64"), ("128",))
    aligned = [size for size in TILED if size != "uneven"]
    grouped = itertools.product(STEP_KERNELS, ("bfloat16",), aligned, (90, 100), ("without_first", "irregular"))
    irregular = itertools.product(KERNELS, ("bfloat16",), ("tall",), (90, 100), ("irregular",))
    everywhere = itertools.product([*of_residual, *of_step, *of_products, *of_library], ARCHITECTURES)
    chosen = [LayerVariant(*variant, architecture) for variant, architecture in everywhere]
    chosen += [LayerVariant(*variant, 90) for variant in others]
    chosen += itertools.starmap(LayerVariant, [*grouped, *irregular])
    chosen += [v for architecture in ARCHITECTURES for p in measured_tiles(architecture) for v in variants_of(p)]
    return list(dict.fromkeys(chosen))


def variants_of(product: ProductClass) -> list[LayerVariant]:
    """The kernels that make products of a class, those with the most registers first."""
    from lgd_kernels.triton_kernels.linear_launches import Sizes
    from lgd_kernels.triton_kernels.linear_library import takes_library

    precision = OF_PRODUCTS[product.precision, product.widest]
    n, d = product.rows, product.columns - (0 if product.even else 3)
    of_samples, of_weights = f"{n}x{d}x{d}", f"{n}x{d}x{n}"  # (n, d_out) and (n, d_in), and (d_out, d_in)
    kernels = {kernel: of_weights if "weight" in kernel else of_samples for kernel in (*STEP_KERNELS, *KERNELS)}
    if precision == "autocast" or takes_library(Sizes(LAYERS, n, d, d), product.precision):
        kernels = {kernel: kernels[kernel] for kernel in KERNELS}  # a visit has no such products
    elif n != d:
        del kernels["step_of_weight"]  # the gate's nets have one width
    return [LayerVariant(kernel, precision, size, product.architecture) for kernel, size in kernels.items()]


def _residual_launch(variant: LayerVariant) -> tuple:
    import torch

    from lgd_kernels.triton_kernels import layers
    from lgd_kernels.triton_kernels import local_residual as module
    from lgd_kernels.triton_kernels.activations import GELU_TANH, HUBER

    n, d = SIZES["uneven" if variant.size == "uneven" else "tall"]
    tensors = list(torch.empty(4, LAYERS, n, d, dtype=getattr(torch, variant.precision), device="meta"))
    if variant.size == "apart":
        tensors[1] = torch.empty(LAYERS, n, 2 * d, dtype=tensors[0].dtype, device="meta")[..., :d]
    numbers = [[1.0] * LAYERS] * 3
    with recorded(variant.architecture, module, layers) as launches:
        module.local_residual(*tensors, [GELU_TANH.value] * LAYERS, HUBER.value, 1.0, *numbers, True, True)
    return launches[0]


def _linear_launch(variant: LayerVariant) -> tuple:
    import torch

    from lgd_kernels.triton_kernels import decoupled_linear as module
    from lgd_kernels.triton_kernels import layers, linear_launches
    from lgd_kernels.triton_kernels.activations import HUBER

    (n, d_in, d_out), dtypes = variant.shape, (getattr(torch, name) for name in PRECISIONS[variant.precision])
    dtype, of_weight = dtypes
    z = torch.empty(LAYERS, n, d_in, dtype=dtype, device="meta")
    target, multiplier = torch.empty(2, LAYERS, n, d_out, dtype=dtype, device="meta")
    weight = torch.empty(LAYERS, d_out, d_in, dtype=of_weight, device="meta")
    one, activation, yes = [1.0] * LAYERS, variant.activation, [True]
    with float32_as(variant.precision), recorded(variant.architecture, linear_launches, layers) as launches:
        if variant.kernel.startswith("forward"):
            given = [z], [weight], [weight[:, 0]], [target], [multiplier], activation, variant.kernel == "forward_pre"
            module.decoupled_linear(*given, HUBER.value, 1.0, one, one, one, one, yes, yes)
        else:
            upstream = torch.empty(
                LAYERS, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta"
            )
            given = [z], [weight], [target], [target], [target], upstream, activation, True
            module.decoupled_linear_backward(*given, one, one, yes, yes, yes, [False], [False])
    kernels = {"input_gradient": "input_gradient_kernel", "weight_gradient": "weight_gradient_kernel"}
    name = kernels.get(variant.kernel, "forward_kernel")
    return [launch for launch in launches if launch[0].__name__ == name][-1]


def _step_launch(variant: LayerVariant) -> tuple:
    import torch

    from lgd_kernels.triton_kernels import decoupled_step as module
    from lgd_kernels.triton_kernels import layers, linear_launches, linear_library, operands, softmax_infogain
    from lgd_kernels.triton_kernels.activations import HUBER

    (n, d, _), dtype = variant.shape, getattr(torch, PRECISIONS[variant.precision][0])
    of_parameters = torch.float64 if dtype == torch.float64 else torch.float32

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    hidden = [[empty(LAYERS - 1, n, d)] for _ in ("z", "multiplier", "velocity")]
    weight, bias = ([[empty(LAYERS, *shape, of=of_parameters)] for _ in range(3)] for shape in ((d, d), (d,)))
    one, adam = [1.0] * LAYERS, 3
    modules = (linear_launches, linear_library, operands, layers, softmax_infogain)
    with float32_as(variant.precision), recorded(variant.architecture, *modules) as launches:
        module.decoupled_step_(
            *(empty(n, d), *hidden, [], *weight, *bias, empty(n, d), *[None] * 6, -100, True),
            *(variant.activation, True, HUBER.value, 1.0, one, one, one),
            *(1, 0.1, 0.5, 0.1, adam, empty(2, 7, of=torch.float64)),
        )
    name = STEP_KERNELS.get(variant.kernel) or LIBRARY_KERNELS[variant.kernel]
    of_kernel = [launch for launch in launches if launch[0].__name__ == name]
    # the last forward pass over hidden layers, with their multipliers' step: the head's comes after it
    return of_kernel[-2 if name in ("forward_kernel", "judge_kernel") else -1]


@contextlib.contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Within the block torch's switch says whether float32 is multiplied on tensor cores."""
    import torch

    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
