"""What test_decoupled_linear.py asks of every backend, of the CUDA kernels and the glue of a CUDA build, on this CPU.

Run by `python -m tools.gates cuda_on_host`, which names the built glue in LGD_CUDA_GLUE_ON_HOST.
"""

from __future__ import annotations

import test_decoupled_linear

from cuda_on_host import glue_fixtures

globals().update(glue_fixtures.tests_of(test_decoupled_linear))
from cuda_on_host.glue_fixtures import backend, capability, glue  # noqa: E402, F401 (instead of the one of that file)


def test_the_glue_refuses_what_would_be_read_beyond_its_end(backend):  # noqa: F811
    test_decoupled_linear.test_the_compiled_ops_refuse_what_would_be_read_beyond_its_end(None)
