"""Which implementations exist on this machine, and which one answers for an op.

    backend      device   what it is
    cpp          cpu      the compiled extension `_C`: AVX-512, AVX2 or scalar code, chosen at run time
    triton       cuda     `triton_kernels/`: every softmax_infogain op; on any compute capability from 8.0 on
    reference    any      plain PyTorch (`reference.py`): right, slow, always there

By default the first one in this list that has the op for the device answers. The environment variable LGD_BACKEND,
read at import, or `backends.force(name)` picks one for all ops; what it has no kernel for, plain PyTorch answers. With
TRITON_INTERPRET=1 the Triton kernels also run on the CPU, in Triton's interpreter, when they are forced: for tests.

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

from lgd_kernels import reference

BACKENDS = ("auto", "cpp", "triton", "reference")
CHECK_LABELS = os.environ.get("LGD_CHECK_LABELS", "0") != "0"
_HOW_TO_BUILD = "to get the fast kernels, install g++ and ninja and run `make install` (or `pip install .`) again"


def _load_extension() -> tuple[ModuleType | None, str]:
    """(the compiled extension or None, why it is missing)."""
    try:
        return importlib.import_module("lgd_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


@functools.cache
def _load_triton() -> tuple[ModuleType | None, str]:
    """(the Triton kernels of softmax_infogain or None, why they are missing). Not before they are needed: to import
    Triton takes longer than everything else here."""
    try:
        return importlib.import_module("lgd_kernels.triton_kernels.softmax_infogain"), ""
    except ImportError as error:
        return None, str(error)


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
    if name == "triton" and _load_triton()[0] is None:
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
    """Whether a compiled kernel exists for `op` on devices of this type."""
    return device_type == "cpu" and extension is not None and hasattr(extension, op)


def implementation(op: str, device_type: str) -> ModuleType:
    """The module whose function `op` answers for tensors on a device of this type."""
    if _forced in ("auto", "cpp") and has_kernel(op, device_type):
        return extension
    if _forced in ("auto", "triton") and _runs_triton(device_type):
        kernels, _ = _load_triton()
        if kernels is not None and op in kernels.OPS:
            return kernels
    return reference


def _name_of(module: ModuleType) -> str:
    return {extension: "cpp", reference: "reference"}.get(module, "triton")


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
    kernels, missing_because = _load_triton()
    lines.append(f"Triton              {'yes' if kernels is not None else f'no: {missing_because}'}")
    serving = "plain PyTorch serves it" if kernels is None else "Triton serves it where it has the op"
    lines.append(f"CUDA                {'available' if torch.cuda.is_available() else 'no device'}; {serving}")
    lines += ["", f"{'op':36}{'cpu':12}cuda"]
    for op in ops.names():
        cpu, cuda = (_name_of(implementation(op, device)) for device in ("cpu", "cuda"))
        lines.append(f"{op:36}{cpu:12}{cuda}")
    return "\n".join(lines)


def show_backends() -> None:
    """Print what is built, for which instruction sets, and what serves which device."""
    print(describe())
