"""Fixtures with which the tests of an op run on the C++ glue of a CUDA build, on this CPU.

LGD_CUDA_GLUE_ON_HOST names the built glue.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import ModuleType

import pytest

from cuda_on_host import load_glue
from lgd_kernels import backends


def tests_of(module: ModuleType) -> dict[str, object]:
    """What a test file defines, without the tests that know nothing of backends."""

    def is_wanted(name: str) -> bool:
        return not name.startswith("test_") or "backend" in inspect.signature(vars(module)[name]).parameters

    return {name: value for name, value in vars(module).items() if not name.startswith("__") and is_wanted(name)}


def answer_with(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """These kernels answer, as those of a CUDA build do on a device, and the reference for what they have not."""

    def implementation(op, device_type, logits=None, wide=False):
        return kernels if hasattr(kernels, op) and not wide else backends.reference

    monkeypatch.setattr(backends, "implementation", implementation)
    monkeypatch.setattr(backends, "asks_for_width", lambda device_type: True)


@pytest.fixture(scope="session")
def glue() -> ModuleType:
    return load_glue(Path(os.environ["LGD_CUDA_GLUE_ON_HOST"]))


@pytest.fixture(params=[80, 90])
def capability(request) -> int:
    return request.param


@pytest.fixture
def backend(capability, glue, nan_prefill, monkeypatch):
    """The kernels, configured for an older and a newer chip, and their threads run in either order."""
    glue.set_compute_capability(capability)
    glue.run_in_reverse(capability == 80)

    answer_with(glue, monkeypatch)
    return "cuda_on_host"


@pytest.fixture
def compiled(backend):
    return backend
