"""All of test_softmax_infogain.py on the CUDA kernels and the C++ glue of a CUDA build, on this CPU.

Run by `python -m tools.gates cuda_on_host`, which names the built glue in LGD_CUDA_GLUE_ON_HOST.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import test_softmax_infogain
from test_softmax_infogain import *  # noqa: F403

from cuda_on_host import load_glue
from lgd_kernels import backends

# about the compiled extension, threads of the CPU, or the memory that the CPU's glue allocates
_OTHERS = ("extension_has_every_op", "allocate", "on_the_threads")
for _name in [name for name in vars(test_softmax_infogain) if name.startswith("test_")]:
    if any(words in _name for words in _OTHERS):
        del globals()[_name]


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
    reference = backends.reference
    monkeypatch.setattr(backends, "implementation", lambda op, *_: glue if hasattr(glue, op) else reference)
    return "cuda_on_host"


@pytest.fixture
def compiled(backend):
    return backend
