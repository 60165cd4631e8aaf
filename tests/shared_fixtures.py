"""Fixtures that every test file shares."""

from __future__ import annotations

from collections.abc import Iterator

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
