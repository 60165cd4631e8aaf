"""Which implementations exist on this machine, and which one answers for an op.

    backend      device   what it is
    cpp          cpu      the compiled extension `_C`: AVX-512, AVX2 or scalar code, chosen at run time
    cuda         cuda     CUDA C++ in the same extension, where it was built with nvcc: every softmax_infogain op,
                          local_residual, and decoupled_linear and its backward for layers up to 128 wide
    triton       cuda     `triton_kernels/`: every softmax_infogain op, local_residual, decoupled_linear and its
                          backward, decoupled_step_; on any compute capability from 8.0 on
    reference    any      plain PyTorch (`reference.py`): right, slow, always there

On the CPU the first one in this list that has the op answers. On a CUDA device the first row of this table that fits
says which of the two is asked first; the other one answers for what that does not have, and then plain PyTorch. The
rows come from counting the bytes that each has to move; on a GPU nothing has been measured yet.

    op                                  logits                          first    because
    softmax_infogain_backward_matrix    any                             triton   `cuda` reads all labels for each 32
                                                                                 entries of H, Triton sorts them once
    any                                 float64                         triton   `cuda` reads them twice
    any                                 classes not side by side        triton   `cuda` reads them twice; Triton from
                                                                                 1024 classes on (float32) as well
    any                                 any other                       cuda     rows up to 512 KB stay on chip with
                                                                                 clusters (compute capability 9.0 and
                                                                                 more) and in 64 KB without; Triton
                                                                                 keeps up to 32,768 classes
    count_labels                        -                               cuda

    op                                  layers                          first    because
    local_residual                      any                             cuda     Triton's bytes, but in one launch for
                                                                                 all activations, not one for each
    decoupled_linear, its backward      d_in and d_out at most 128      cuda     weights stay in shared memory; backward
                                                                                 reads delta and z once where Triton's
                                                                                 two products read delta twice
    the same                            any other                       triton   `cuda` has no kernel for them
    decoupled_step_                     any                             triton   `cuda` has no kernel for it

decoupled_step_ multiplies by tiles with everything in their epilogues, all layers of a shape in one launch, or by
cuBLAS with a kernel of its own after it: from width 4096 on in 16 bits and tf32, from 256 on in exact float32, where
the layers of a stack lie equally far apart (`triton_kernels/linear_library.py` says why; counted as well).

The environment variable LGD_BACKEND, read at import, or `backends.force(name)` picks one for all ops; what it has no
kernel for, plain PyTorch answers. With TRITON_INTERPRET=1 the Triton kernels also run on the CPU, in Triton's
interpreter, when they are forced: for tests.

LGD_CHECK_LABELS=1, read at import, makes every op on a CUDA device wait for its labels and raise IndexError for one
that is out of range. Without it such a row's loss is NaN and its gradient 0.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from lgd_kernels import reference

BACKENDS = ("auto", "cpp", "cuda", "triton", "reference")
_TRITON_MODULES = ("softmax_infogain", "local_residual", "decoupled_linear", "decoupled_step")
WIDEST_ON_CUDA = 128  # kMostWidth in csrc/cuda/decoupled_linear_config.h
CHECK_LABELS = os.environ.get("LGD_CHECK_LABELS", "0") != "0"
_HOW_TO_BUILD = "to get the fast kernels, install g++ and ninja and run `make install` (or `pip install .`) again"
_HOW_TO_BUILD_CUDA = "install nvcc and a torch with CUDA and run `pip install --no-build-isolation .` again"


def _load_extension() -> tuple[ModuleType | None, str]:
    """(the compiled extension or None, why it is missing)."""
    try:
        return importlib.import_module("lgd_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


@functools.cache
def _load_triton() -> tuple[dict[str, ModuleType], str]:
    """(the modules of Triton kernels by the ops they have, why there are none). Not before they are needed: to import
    Triton takes longer than everything else here."""
    try:
        modules = [importlib.import_module(f"lgd_kernels.triton_kernels.{name}") for name in _TRITON_MODULES]
    except ImportError as error:
        return {}, str(error)
    return {op: module for module in modules for op in module.OPS}, ""


@functools.cache
def _cuda_ops() -> frozenset[str]:
    """The ops for which CUDA kernels were built."""
    return frozenset(() if extension is None else extension.cuda_ops())


def _runs_triton(device_type: str) -> bool:
    """Whether Triton kernels can take tensors on a device of this type."""
    if device_type == "cpu":
        return _forced == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    return device_type == "cuda"


def _checked_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "cpp" and extension is None:
        raise RuntimeError(f"{where}: backend 'cpp' is not built ({_missing_because}); {_HOW_TO_BUILD}")
    if name == "cuda" and not _cuda_ops():
        raise RuntimeError(f"{where}: backend 'cuda' is not built; {_HOW_TO_BUILD_CUDA}")
    if name == "triton" and not _load_triton()[0]:
        raise RuntimeError(
            f"{where}: backend 'triton' is not there ({_load_triton()[1]}); install it: pip install triton"
        )
    return name


extension, _missing_because = _load_extension()
_forced = _checked_name(os.environ.get("LGD_BACKEND", "auto"), "LGD_BACKEND")
if extension is None and _forced == "auto":
    warnings.warn(
        f"lgd_kernels runs on its plain PyTorch reference, which is right but slow ({_missing_because}); "
        + _HOW_TO_BUILD,
        stacklevel=3,
    )


def has_kernel(op: str, device_type: str) -> bool:
    """Whether the extension has a kernel for `op` on devices of this type."""
    if device_type == "cuda":
        return op in _cuda_ops()
    return device_type == "cpu" and extension is not None and hasattr(extension, op)


def implementation(op: str, device_type: str, logits: Tensor | None = None, wide: bool = False) -> ModuleType:
    """The module whose function `op` answers for tensors on a device of this type.

    logits: (O, C, I), those of the call; float32 with the classes side by side if they are not given.
    wide: whether `is_wide` for the layers of the call."""
    order = ("cpp", "triton")
    if device_type == "cuda":
        order = ("cuda", "triton")
        if logits is not None and op.startswith("softmax_infogain"):
            order = preferred_on_cuda(op, logits.dtype, logits.shape[1] == 1 or logits.stride(1) == 1)
    for name in order if _forced == "auto" else (_forced,):
        if (kernels := _kernels(name, op, device_type)) and not (wide and name == "cuda"):
            return kernels
    return reference


def preferred_on_cuda(op: str, dtype: torch.dtype, classes_side_by_side: bool) -> tuple[str, str]:
    """The backends to ask for an op of softmax_infogain on a CUDA device, in this order: the table above."""
    if op == "softmax_infogain_backward_matrix" or dtype == torch.float64 or not classes_side_by_side:
        return "triton", "cuda"
    return "cuda", "triton"


def asks_for_width(device_type: str) -> bool:
    """Whether it depends on the width of layers who answers for them."""
    return device_type == "cuda"


def is_wide(z: Tensor, weight: Tensor) -> bool:
    """Whether a stack of layers is not for the kernels of `cuda`: too wide, or of dtypes that they do not combine."""
    if max(weight.shape[-2:]) > WIDEST_ON_CUDA:
        return True
    return weight.dtype != z.dtype and (z.dtype, weight.itemsize) != (torch.float32, 2)


def _kernels(name: str, op: str, device_type: str) -> ModuleType | None:
    """Backend `name`, if it has the op for devices of this type."""
    if name == {"cpu": "cpp", "cuda": "cuda"}.get(device_type):
        return extension if has_kernel(op, device_type) else None
    if name == "triton" and _runs_triton(device_type):
        return _load_triton()[0].get(op)
    return None


def _name_of(module: ModuleType, device_type: str) -> str:
    compiled = "cuda" if device_type == "cuda" else "cpp"
    return {extension: compiled, reference: "reference"}.get(module, "triton")


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Within the `with` block every op is answered by backend `name` where that backend has it.

    name: one of BACKENDS. Raises ValueError for another name, RuntimeError for a backend that is not built.
    """
    global _forced
    before, _forced = _forced, _checked_name(name, "name")
    try:
        yield
    finally:
        _forced = before


def describe() -> str:
    """The text that `show_backends` prints."""
    from lgd_kernels import ops

    lines = [f"lgd_kernels on torch {torch.__version__}, Python {sys.version.split()[0]}, LGD_BACKEND={_forced}", ""]
    if extension is None:
        lines.append(f"compiled extension  no: {_missing_because}; {_HOW_TO_BUILD}")
    else:
        built = ", ".join(extension.built_capabilities())
        lines.append(f"compiled extension  yes: built for {built} with {extension.compiler()}")
        lines.append(f"this CPU runs       {extension.cpu_capability()}, {torch.get_num_threads()} threads")
    lines.append(f"CUDA kernels        {_about_cuda_kernels()}")
    kernels, missing_because = _load_triton()
    lines.append(f"Triton              {'yes' if kernels else f'no: {missing_because}'}")
    lines.append(f"CUDA device         {_about_cuda_device()}")
    lines.append(f"decoupled_step_     {_about_products()}")
    lines += ["", f"{'op':36}{'cpu':12}cuda"]
    for op in ops.names():
        cpu, cuda = (_name_of(implementation(op, device), device) for device in ("cpu", "cuda"))
        lines.append(f"{op:36}{cpu:12}{cuda}")
    return "\n".join(lines)


def _about_cuda_kernels() -> str:
    if not _cuda_ops():
        return f"no: {_HOW_TO_BUILD_CUDA}"
    return "yes: built with CUDA {}.{}".format(*divmod(extension.cuda_version() // 10, 100))


def _about_products() -> str:
    if not _load_triton()[0]:
        return "on CUDA: plain PyTorch"
    widths = importlib.import_module("lgd_kernels.triton_kernels.linear_library").WIDTHS
    names = {"half": "16 bits", "tf32": "tf32", "ieee": "float32"}
    library = ", ".join(f"{widths[precision]} ({name})" for precision, name in names.items())
    return f"on CUDA: products by fused tiles, by cuBLAS from width {library}"


def _about_cuda_device() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def show_backends() -> None:
    """Print what is built, for which instruction sets, and what serves which device."""
    print(describe())
