"""What test_local_residual.py asks of every backend, of the CUDA kernels and the glue of a CUDA build, on this CPU.

Run by `python -m tools.gates cuda_on_host`, which names the built glue in LGD_CUDA_GLUE_ON_HOST.
"""

from __future__ import annotations

import test_local_residual

from cuda_on_host import glue_fixtures

globals().update(glue_fixtures.tests_of(test_local_residual))
from cuda_on_host.glue_fixtures import backend, capability, glue  # noqa: E402, F401 (instead of the one of that file)
