"""The device that the tests run on, torch's default device (see conftest.py), and the backends that answer there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import torch

from lgd_kernels import backends, reference

DEVICE = torch.get_default_device()
ON_CPU = DEVICE.type == "cpu"


def available(names: Iterable[str]) -> list[str]:
    """Those of the backends that this machine has."""
    found = []
    for name in names:
        with contextlib.suppress(ValueError, RuntimeError), backends.force(name):
            found.append(name)
    return found


if not ON_CPU:
    BACKENDS = available(["cuda", "triton", "reference"])
elif os.environ.get("TRITON_INTERPRET") == "1":  # a process of its own, started by test_triton_softmax_infogain.py
    BACKENDS = ["triton"]
else:
    BACKENDS = available(["cpp", "reference"])


def serving(op: str) -> list[str]:
    """The backends with a kernel for `op`, and the reference."""

    def has_one(name: str) -> bool:
        with backends.force(name):
            return backends.implementation(op, DEVICE.type) is not reference

    return [name for name in BACKENDS if name == "reference" or has_one(name)]
