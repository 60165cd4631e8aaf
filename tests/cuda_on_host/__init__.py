"""The CUDA kernels on a CPU: builds them with g++ and answers for the ops of softmax_infogain, on CPU tensors.

`Kernels` has the functions that ops.py expects of a backend, and runs them in any configuration. What the glue of a
CUDA build does, it does here in Python: allocation, conversions, the choice of the configuration. `build_glue` makes
the C++ glue itself, which takes more time to compile.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils import cpp_extension

from lgd_kernels.reference import accumulation_dtype

HERE = Path(__file__).resolve().parent
MODES = ("register_lanes", "register_block", "shared_lanes", "shared_block", "stream", "columns")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as DType in csrc/common/dtype.h
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DLGD_CUDA_ON_HOST")
PARTS = ("softmax_infogain", "layers", "harness")
GLUE = ("softmax_infogain", "local_residual", "decoupled_linear")  # files of csrc/torch that CUDA changes


def compiler() -> str | None:
    """The C++ compiler, or None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels for the host; the library. Its parts are compiled at the same time."""
    objects = [folder / f"{name}.o" for name in PARTS]
    commands = [
        [compiler(), *FLAGS, *flags, f"-I{HERE}", "-c", HERE / f"{name}.cpp", "-o", target]
        for name, target in zip(PARTS, objects, strict=True)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    library = folder / "cuda_on_host.so"
    _run([compiler(), *flags, "-shared", *objects, "-o", library])
    return library


def _run(command: list[str | Path]) -> None:
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr


def build_glue(library: Path, objects: Path) -> Path:
    """The C++ glue of a CUDA build as a Python module beside the kernels in `library`, which it calls.

    objects: the folder with the object files of the ordinary build; only what CUDA changes is compiled anew."""
    module = library.with_name("cuda_glue_on_host.so")
    csrc = HERE.parents[1] / "csrc"
    sources = [HERE / "glue.cpp", *(csrc / "torch" / f"{name}.cpp" for name in GLUE)]
    others = ("common", "huge_pages", "layers_bindings", "softmax_infogain_autograd", "softmax_infogain_bindings")
    others = [*(f"torch/{name}" for name in (*others, "stacks")), "cpu/gemm"]
    compiled = [library.with_name(f"glue_{source.stem}.o") for source in sources]
    command = [compiler(), "-std=c++20", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
    command += ["-Wall", "-Wno-unknown-pragmas", "-DLGD_WITH_CUDA=1"]
    command += [f"-I{path}" for path in [*cpp_extension.include_paths("cpu"), sysconfig.get_path("include")]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: _run([*command, "-c", job[0], "-o", job[1]]), zip(sources, compiled, strict=True)))
    command = [compiler(), "-shared", "-fopenmp", *compiled, *(objects / "csrc" / f"{name}.o" for name in others)]
    command += [library, *(f"-L{path}" for path in cpp_extension.library_paths("cpu"))]
    command += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", f"-Wl,-rpath,{library.parent}", "-o", module]
    _run(command)
    return module


def load_glue(module: Path) -> ModuleType:
    """The functions of softmax_infogain that take CPU tensors for those of a CUDA device; of its own it has
    set_compute_capability and run_in_reverse."""
    spec = importlib.util.spec_from_file_location("cuda_glue_on_host", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class _Rows3(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("dtype", "outer_stride", "class_stride", "inner_stride")
    ]

    def __init__(self, tensor: Tensor | None = None):
        if tensor is not None:
            strides = (*tensor.stride(), 0)[:3]
            super().__init__(tensor.data_ptr(), DTYPES.index(tensor.dtype), *strides)


class _Rows2(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("outer_stride", ctypes.c_int64), ("inner_stride", ctypes.c_int64)]

    def __init__(self, tensor: Tensor | None = None):
        if tensor is not None:
            super().__init__(tensor.data_ptr(), *(*tensor.stride(), 0, 0)[:2])


class _Arguments(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("outer", "classes", "inner")],
        *[(name, _Rows3) for name in ("logits", "matrix")],
        *[(name, _Rows2) for name in ("labels", "background", "diagonal", "crow", "col", "values")],
        *[(name, ctypes.c_int64) for name in ("n_rows", "ignore_index")],
        ("z_loss", ctypes.c_double),
        *[(name, _Rows3) for name in ("grad", "grad_grad")],
        *[(name, _Rows2) for name in ("loss", "lse", "norm", "max", "log_sum", "grad_loss", "grad_lse", "made_for")],
        *[(name, _Rows2) for name in ("grad_grad_loss", "grad_grad_lse", "result")],
    ]


@dataclass(frozen=True)
class Configuration:
    """As in csrc/cuda/softmax_infogain_config.h."""

    mode: str
    lanes: int = 32
    threads: int = 128
    cluster: int = 1

    @property
    def numbers(self) -> ctypes.Array:
        return (ctypes.c_int * 4)(MODES.index(self.mode), self.lanes, self.threads, self.cluster)


def _made_from(numbers) -> Configuration:
    mode, *rest = numbers
    return Configuration(MODES[mode], *rest)


class Kernels:
    """The ops, answered by the kernels in `library`.

    configuration: instead of the one that is chosen for the input, where it fits.
    """

    def __init__(self, library: Path, configuration: Configuration | None = None, compute_capability: int = 90):
        self.library = ctypes.CDLL(str(library))
        self.library.take_failure.restype = ctypes.c_char_p
        self.library.configure.restype = self.library.fits.restype = ctypes.c_bool
        self.configuration = configuration
        self.compute_capability = compute_capability
        self.used: set[str] = set()  # the modes of all launches

    def configure(
        self, classes, element_size, *, side_by_side=True, aligned=True, packed=True, compute_capability=90
    ) -> Configuration:
        numbers = (ctypes.c_int * 4)()
        arguments = (ctypes.c_int64(classes), element_size, side_by_side, aligned, packed, compute_capability)
        assert self.library.configure(*arguments, numbers), f"does not fit: {arguments}"
        return _made_from(numbers)

    def misuse(self, which: int, result: Tensor) -> str:
        """Run a kernel that is wrong on purpose; what is reported."""
        self.library.run_misused(which, ctypes.c_void_p(result.data_ptr()))
        return self.library.take_failure().decode()

    def run_in_reverse(self, reverse: bool) -> None:
        self.library.run_in_reverse(reverse)

    # -----------------------------------------------------------------------------------------------------------------
    # The ops
    # -----------------------------------------------------------------------------------------------------------------

    def softmax_infogain(self, logits, labels, *rest):
        *h, ignore_index, z_loss, row_scale, need_lse, need_norm = rest
        loss = _per_row(logits)
        lse, norm = (torch.empty_like(loss) if needed else None for needed in (need_lse, need_norm))
        grad = None if row_scale is None else torch.empty_like(logits)
        self._run(
            "forward", logits, labels, h, ignore_index, z_loss, loss=loss, lse=lse, norm=norm, grad=grad,
            grad_loss=row_scale,
        )  # fmt: skip
        nothing = loss.new_empty(0)
        outputs = (nothing if x is None else x for x in (lse, logits.new_empty(0) if grad is None else grad, norm))
        return loss, *outputs

    def softmax_infogain_reduced(self, logits, labels, *rest):
        *h, ignore_index, z_loss, sample_weight, divisor, need_grad = rest
        dtype = accumulation_dtype(logits.dtype)
        denominator = (
            (labels != ignore_index).sum().to(dtype) if divisor is None else torch.tensor(divisor, dtype=dtype)
        )
        scale = denominator.reciprocal()
        row_scale = scale.expand(labels.shape) if sample_weight is None else sample_weight * scale
        loss, _, grad, _ = self.softmax_infogain(
            logits, labels, *h, ignore_index, z_loss, row_scale if need_grad else None, False, False
        )
        return (loss if sample_weight is None else loss * sample_weight).sum() / denominator, scale, grad

    def softmax_infogain_reduced_with_node(self, *args):
        return None  # no node of its own: the caller takes the op

    def softmax_infogain_backward(self, logits, labels, *rest):
        *h, ignore_index, z_loss, grad_loss, grad_lse = rest
        grad = torch.empty_like(logits)
        self._run("forward", logits, labels, h, ignore_index, z_loss, grad=grad, grad_loss=grad_loss, grad_lse=grad_lse)
        return grad

    def softmax_infogain_backward_(self, grad, made_for, logits, labels, *rest):
        *h, ignore_index, z_loss, grad_loss, grad_lse = rest
        inputs = {"grad_loss": grad_loss, "grad_lse": grad_lse, "made_for": made_for}
        self._run("forward", logits, labels, h, ignore_index, z_loss, grad=grad, **inputs)

    def softmax_infogain_double_backward(self, logits, labels, *rest):
        *h, ignore_index, z_loss, grad_loss, grad_lse, grad_grad = rest
        grad, of_loss, of_lse = torch.empty_like(logits), _per_row(logits), _per_row(logits)
        self._run(
            "double_backward", logits, labels, h, ignore_index, z_loss, grad=grad, grad_loss=grad_loss,
            grad_lse=grad_lse, grad_grad=grad_grad.to(logits.dtype), grad_grad_loss=of_loss, grad_grad_lse=of_lse,
        )  # fmt: skip
        return grad, of_loss, of_lse

    def softmax_infogain_backward_matrix(self, logits, labels, n_rows, ignore_index, grad_loss):
        largest, log_sum = _per_row(logits), _per_row(logits)
        no_h = [None] * 6
        self._run("forward", logits, labels, no_h, ignore_index, 0.0, n_rows=n_rows, max=largest, log_sum=log_sum)
        result = logits.new_empty(n_rows, logits.shape[1], dtype=accumulation_dtype(logits.dtype))
        self._run(
            "backward_matrix", logits, labels, no_h, ignore_index, 0.0, n_rows=n_rows, max=largest, log_sum=log_sum,
            grad_loss=grad_loss, result=result,
        )  # fmt: skip
        return result

    # -----------------------------------------------------------------------------------------------------------------

    def _run(self, function, logits, labels, h, ignore_index, z_loss, n_rows=None, **tensors):
        if labels.numel() == 0:
            if "result" in tensors:
                tensors["result"].zero_()
            return
        matrix, background, diagonal, crow, col, values = h
        dtype = accumulation_dtype(logits.dtype)
        if matrix is not None and (matrix.dtype != torch.bfloat16 or dtype == torch.float64):
            matrix = matrix.to(dtype)
        rows = logits.shape[1] if matrix is None else matrix.shape[0]
        converted = {
            "background": None if background is None else background.to(dtype),
            "diagonal": None if diagonal is None else diagonal.to(dtype),
            "crow": None if crow is None else crow.long().contiguous(),
            "col": None if col is None else col.long().contiguous(),
            "values": None if values is None else values.to(dtype).contiguous(),
        }
        arguments = _Arguments(
            *(logits.shape[0], logits.shape[1], logits.shape[2]),
            n_rows=rows if n_rows is None else n_rows,
            ignore_index=ignore_index,
            z_loss=z_loss,
        )
        for name, tensor in {"logits": logits, "labels": labels, "matrix": matrix, **converted, **tensors}.items():
            setattr(arguments, name, type(getattr(arguments, name))(tensor))
        call = [ctypes.byref(arguments)]
        if function != "backward_matrix":
            configuration = self._configuration(arguments)
            self.used.add(configuration.mode)
            call.append(configuration.numbers)
        status = getattr(self.library, function)(*call)
        failure = self.library.take_failure().decode()
        assert not failure, failure
        assert status == 0, f"{function}: status {status}"

    def _configuration(self, arguments: _Arguments) -> Configuration:
        """The chosen one, unless another is forced and the input can be served by it."""
        forced = self.configuration
        if forced is not None and self.library.fits(ctypes.byref(arguments), forced.numbers):
            return forced
        numbers = (ctypes.c_int * 4)()
        self.library.configuration_of(ctypes.byref(arguments), self.compute_capability, numbers)
        return _made_from(numbers)


def _per_row(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], logits.shape[2], dtype=accumulation_dtype(logits.dtype))
