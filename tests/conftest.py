"""Fixtures that every test file shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from lgd_kernels import backends

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("tests")

if os.environ.get("TRITON_INTERPRET") == "1":  # a process of its own, started by test_triton_softmax_infogain.py
    CPU_BACKENDS = ("triton",)
elif backends.extension is not None:
    CPU_BACKENDS = ("cpp", "reference")
else:
    CPU_BACKENDS = ("reference",)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request) -> Iterator[str]:
    """Each backend that this machine has, forced for the test."""
    with backends.force(request.param):
        yield request.param


@pytest.fixture
def compiled() -> Iterator[None]:
    """The compiled kernels, for what the plain reference does not promise; skips where they are not built."""
    if backends.extension is None:
        pytest.skip("the compiled extension is not built")
    with backends.force("cpp"):
        yield


@pytest.fixture
def nan_prefill() -> Iterator[None]:
    """Uninitialized memory holds NaN, in Python and in C++, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
