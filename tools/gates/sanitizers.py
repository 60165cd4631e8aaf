"""The C++ under AddressSanitizer and UndefinedBehaviorSanitizer, once for each instruction set."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gates.common import CAPABILITIES, FOLDER, ROOT, GateError, build, pytest_command, run, summary

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
# what runs compiled kernels on odd sizes, strides, layouts, dtypes, bad labels, sparse H, first and second derivatives
TESTS = (  # in two shares, so that two processors have the same to do
    (
        "test_softmax_infogain.py",
        "test_large_gradients.py",
        "test_bad_input.py",
        "test_complaints.py",
        "test_properties.py",
    ),
    (
        "test_local_residual.py",
        "test_decoupled_linear.py",
        "test_decoupled_step.py",
        "test_decoupled_step_bad_input.py",
    ),
)
# inputs beyond 2^31 elements, compilers started by torch.compile, new processes and memory that the sanitizer itself
# takes are other tests' business; gradcheck makes the same small calls a hundred times
EXPRESSION = (
    "not complaint_07 and not compiled_function and not when_compiled and not test_compile and not environment and not "
    "256_megabytes and not resident_set and not inside_a_compiled and not gradcheck"
)
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")  # libstdc++: ASan must find __cxa_throw when it starts


def sanitizers() -> None:
    """The C++ under AddressSanitizer and UBSan, for each instruction set of this machine"""
    library = build("sanitizers", FLAGS)
    preload = " ".join(sanitizer_runtime(name) for name in RUNTIMES)
    # the best code first: the others differ in the width of their vectors, and run each value of a parameter once
    best, *others = reversed(_capabilities())
    shares = [(best, 2, tests) for tests in TESTS] + [(other, 1, tests) for other in others for tests in TESTS]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for line in pool.map(lambda share: _check(library, preload, *share), shares):
            print(line)


def sanitizer_runtime(name: str) -> str:
    path = run([os.environ.get("CXX", "g++"), f"-print-file-name={name}"], f"looking for {name}").strip()
    if not Path(path).is_absolute():
        raise GateError(f"{name} was not found; it comes with g++ (Debian: libasan8 and libubsan1 for g++ 12)")
    return path


def _capabilities() -> list[str]:
    """The instruction sets that this machine has."""
    import torch

    count = CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1
    for capability in CAPABILITIES[count:]:
        print(f"{capability}: skipped, this machine does not have it")
    return list(CAPABILITIES[:count])


def _check(library: Path, preload: str, capability: str, cover: int, tests: Sequence[str]) -> str:
    """Run tests on one instruction set; a line about them. Raises GateError for a report or a failing test."""
    reports = FOLDER / "sanitizers" / f"report-{capability}-{tests[0]}"
    for old in reports.parent.glob(f"{reports.name}.*"):
        old.unlink()
    command = [sys.executable, *pytest_command(library, capability, cover, tests, EXPRESSION), "--capture=sys"]
    failure = None
    try:
        output = run(
            command,
            f"{tests[0]} and others on {capability}",
            cwd=library,
            LD_PRELOAD=preload,
            PYTHONPATH=f"{library}{os.pathsep}{ROOT}",
            ATEN_CPU_CAPABILITY=capability.lower(),
            # Python and torch keep memory until the process ends, so every run would report their leaks
            ASAN_OPTIONS=f"detect_leaks=0:log_path={reports}",
            UBSAN_OPTIONS=f"print_stacktrace=1:log_path={reports}",
        )
    except GateError as error:
        failure = error
    found = sorted(reports.parent.glob(f"{reports.name}.*"))
    if found:
        raise GateError(f"{capability}: {len(found)} sanitizer reports, the first:\n{found[0].read_text()[:6000]}")
    if failure is not None:
        start = failure.output.find("runtime error:")  # UBSan writes to stderr when ASan is there too
        raise failure if start < 0 else GateError(f"{capability}: {failure.output[max(start - 300, 0) :][:6000]}")
    return f"{capability}, {tests[0]} and others: {summary(output)}, no report"
