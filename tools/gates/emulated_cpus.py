"""The vector code on CPUs that this machine is not: qemu-user stops with SIGILL at what the emulated CPU lacks."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gates.common import ROOT, build, pytest_command, run, summary, tool

CPUS = {"EPYC-Milan": "AVX2", "IvyBridge": "DEFAULT"}  # what each must be taken for; IvyBridge has AVX, not AVX2
TESTS = (
    "test_softmax_infogain.py",
    "test_local_residual.py",
    "test_decoupled_linear.py",
    "test_decoupled_step.py",
    "test_bad_input.py",
)
# minutes long under emulation, or about other processes
EXPRESSION = (
    "(test_softmax_infogain and not bits_of_a_long_row) or label_out_of_range "
    "or ((test_local_residual or test_decoupled_linear) "
    "and (energies_and_gradients or of_their_own or strides or nan_goes_through)) "
    "or (test_decoupled_step and (of_their_own or beyond_a_tile or with_an_optimizer))"
)


def emulated_cpus() -> None:
    """The tests of the vector code on an emulated CPU with AVX2 and on one from before it (qemu-user)"""
    emulator = tool("qemu-x86_64", "qemu-user")
    library = build("plain")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for line in pool.map(lambda cpu: _check(emulator, library, cpu), CPUS):
            print(line)


def _check(emulator: str, library: Path, cpu: str) -> str:
    """Run the tests on one CPU; a line about them. Raises GateError if one fails or the process dies."""
    command = [emulator, "-cpu", cpu, sys.executable, *pytest_command(library, CPUS[cpu], 1, TESTS, EXPRESSION)]
    # one thread: others would wait in loops that emulation makes expensive
    output = run(
        command, f"tests on {cpu}", cwd=library, PYTHONPATH=f"{library}{os.pathsep}{ROOT}", OMP_NUM_THREADS="1"
    )
    return f"{cpu} ({CPUS[cpu]}): {summary(output)}"
