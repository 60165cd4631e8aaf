"""Fixtures that every test file shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cuda_on_host
import pytest
import torch
from device import BACKENDS, ON_CPU

from lgd_kernels import backends


@pytest.fixture(params=BACKENDS)
def backend(request) -> Iterator[str]:
    """Each backend that this machine has for the device, forced for the test."""
    with backends.force(request.param):
        yield request.param


@pytest.fixture(params=None if ON_CPU else [name for name in BACKENDS if name != "reference"])
def compiled(request) -> Iterator[None]:
    """The kernels, for what the plain reference does not promise; skips on a CPU for which they are not built."""
    name = getattr(request, "param", "cpp")
    if name not in BACKENDS:
        pytest.skip("the compiled extension is not built")
    with backends.force(name):
        yield


@pytest.fixture(scope="session")
def cuda_on_host_library(tmp_path_factory) -> Path:
    """The CUDA kernels compiled for the host; LGD_CUDA_ON_HOST names a library that is built already."""
    if built := os.environ.get("LGD_CUDA_ON_HOST"):
        return Path(built)
    if cuda_on_host.compiler() is None:
        pytest.skip("no C++ compiler to build the CUDA kernels for the host with")
    return cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def nan_prefill() -> Iterator[None]:
    """Uninitialized memory holds NaN, in Python and in C++, so that an element that nobody writes shows."""
    # warn_only: the memory is what matters here, and on CUDA cross_entropy with inner dimensions is not deterministic
    torch.use_deterministic_algorithms(True, warn_only=not ON_CPU)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def raising_labels(monkeypatch) -> None:
    """Labels out of range raise on a device too, as with LGD_CHECK_LABELS=1; on a CPU they always do."""
    monkeypatch.setattr(backends, "CHECK_LABELS", True)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
