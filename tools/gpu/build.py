"""Builds the extension where it lies, with the compilers of the machine."""

from __future__ import annotations

import re
import sys

from tools.gpu.commands import run
from tools.gpu.stages import FAILED, PASSED, STOPPED, Outcome

BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
SHOW_BACKENDS = (sys.executable, "-m", "lgd_kernels")


def build(seconds: float) -> Outcome:
    """The extension with its CUDA kernels; without them the rest goes on with Triton, but this has failed."""
    built = run("build", BUILD, seconds)
    if built.status is None:
        return Outcome(STOPPED, "see build/gpu/build.log")
    if built.status != 0:
        return Outcome(FAILED, f"exit status {built.status}; see build/gpu/build.log")
    shown = run("backends", SHOW_BACKENDS, seconds)
    kernels = re.search(r"^CUDA kernels +(.*)$", shown.output, re.MULTILINE)
    if shown.status != 0 or kernels is None:
        return Outcome(FAILED, "what was built cannot be imported; see build/gpu/backends.log")
    return Outcome(PASSED if kernels[1].startswith("yes") else FAILED, f"CUDA kernels: {kernels[1]}")
