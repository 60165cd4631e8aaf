"""All of test_softmax_infogain.py on the CUDA kernels, on this CPU; run by `python -m tools.gates cuda_on_host`."""

from __future__ import annotations

import pytest
import test_softmax_infogain
from test_cuda_on_host import kernels, library  # noqa: F401
from test_softmax_infogain import *  # noqa: F403

# about the compiled extension, threads of the CPU, or the memory that the CPU's glue allocates
_OTHERS = ("extension_has_every_op", "allocate", "on_the_threads")
for _name in [name for name in vars(test_softmax_infogain) if name.startswith("test_")]:
    if any(words in _name for words in _OTHERS):
        del globals()[_name]


@pytest.fixture(params=[80, 90])
def capability(request) -> int:
    return request.param


@pytest.fixture
def backend(kernels, capability):  # noqa: F811
    """The kernels, configured for an older and a newer chip, and their threads run in either order."""
    kernels.compute_capability = capability
    kernels.run_in_reverse(capability == 80)
    return "cuda_on_host"


@pytest.fixture
def compiled(backend):
    return backend
