"""All of test_softmax_infogain.py on the CUDA kernels and the C++ glue of a CUDA build, on this CPU.

Run by `python -m tools.gates cuda_on_host`, which names the built glue in LGD_CUDA_GLUE_ON_HOST.
"""

from __future__ import annotations

import test_softmax_infogain
from test_softmax_infogain import *  # noqa: F403

from cuda_on_host.glue_fixtures import backend, capability, compiled, glue  # noqa: F401

# about the compiled extension, threads of the CPU, or the memory that the CPU's glue allocates
_OTHERS = ("extension_has_every_op", "allocate", "on_the_threads")
for _name in [name for name in vars(test_softmax_infogain) if name.startswith("test_")]:
    if any(words in _name for words in _OTHERS):
        del globals()[_name]
