"""Which implementations exist on this machine, and which one answers for an op.

    backend      device   what it is
    cpp          cpu      the compiled extension `_C`: AVX-512, AVX2 or scalar code, chosen at run time
    reference    any      plain PyTorch (`reference.py`): right, slow, always there

By default the first one in this list that serves the device answers. The environment variable LGD_BACKEND, read at
import, or `backends.force(name)` picks one for all ops.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from lgd_kernels import reference

BACKENDS = ("auto", "cpp", "reference")
_HOW_TO_BUILD = "to get the fast kernels, install g++ and ninja and run `make install` (or `pip install .`) again"


def _load_extension() -> tuple[ModuleType | None, str]:
    """(the compiled extension or None, why it is missing)."""
    try:
        return importlib.import_module("lgd_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


def _checked_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "cpp" and extension is None:
        raise RuntimeError(f"{where}: backend 'cpp' is not built ({_missing_because}); {_HOW_TO_BUILD}")
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
    if _forced != "reference" and has_kernel(op, device_type):
        return extension
    return reference


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
    lines.append(
        f"CUDA                {'available' if torch.cuda.is_available() else 'no device; plain PyTorch serves it'}"
    )
    lines += ["", f"{'op':36}{'cpu':12}cuda"]
    for op in ops.names():
        served = ["cpp" if implementation(op, device) is extension else "reference" for device in ("cpu", "cuda")]
        lines.append(f"{op:36}{served[0]:12}{served[1]}")
    return "\n".join(lines)


def show_backends() -> None:
    """Print what is built, for which instruction sets, and what serves which device."""
    print(describe())
