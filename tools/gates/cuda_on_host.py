"""The CUDA kernels on this CPU, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gates.common import FOLDER, ROOT, GateError, build, objects, run, summary, tool
from tools.gates.sanitizers import FLAGS, RUNTIMES, sanitizer_runtime

WORK = FOLDER / "cuda_on_host"
# how many parameters at a time are fully combined
TESTS = {
    "test_cuda_on_host.py": 2,
    "cuda_on_host/full_set.py": 1,
    "test_cuda_layers_on_host.py": 1,
    "cuda_on_host/full_local_residual.py": 1,
    "cuda_on_host/full_decoupled_linear.py": 1,
}


def cuda_on_host() -> None:
    """The CUDA kernels, run on this CPU under sanitizers, and the glue that calls them"""
    tool(os.environ.get("CXX", "g++"), "g++")
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    sys.path.insert(0, str(ROOT / "tests"))
    import cuda_on_host

    build("plain")
    library = cuda_on_host.build(WORK, (*FLAGS.split(), "-O0"))  # with -O1 g++ 12 takes more than two minutes
    _check_the_sanitizer(library)
    glue = cuda_on_host.build_glue(library, objects("plain"))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for test, found in zip(TESTS, pool.map(lambda test: _check(library, glue, test), TESTS), strict=True):
            print(f"{test}: {found}, no report")


def _check_the_sanitizer(library: Path) -> None:
    """Raise GateError unless a kernel that reads and writes shared memory beyond its end (misuse.cuh) is reported."""
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).run_misused(2, (ctypes.c_float * 64)())"
    try:
        run([sys.executable, "-c", code], "a kernel that is wrong on purpose", **_environment("detect_leaks=0"))
    except GateError as error:
        if "heap-buffer-overflow" in error.output:
            print("an access beyond shared memory: reported")
            return
        raise
    raise GateError("AddressSanitizer did not report an access beyond shared memory")


def _environment(asan_options: str) -> dict[str, str]:
    """What makes a process of Python load the sanitizers before anything else."""
    return {"LD_PRELOAD": " ".join(sanitizer_runtime(name) for name in RUNTIMES), "ASAN_OPTIONS": asan_options}


def _check(library: Path, glue: Path, test: str) -> str:
    """Run tests on the kernels; how many. Raises GateError for a report of a sanitizer or a failing test."""
    reports = WORK / f"report-{test.replace('/', '-')}"
    command = ["-m", "pytest", "-p", "tools.gates.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    command += [f"--cover={TESTS[test]}", "--capture=sys", ROOT / "tests" / test]
    failure = None
    try:
        output = run(
            [sys.executable, *command],
            test,
            LGD_CUDA_ON_HOST=library,
            LGD_CUDA_GLUE_ON_HOST=glue,
            LGD_BACKEND="reference",
            **_environment(f"detect_leaks=0:detect_stack_use_after_return=0:log_path={reports}"),
            UBSAN_OPTIONS=f"print_stacktrace=1:log_path={reports}",
        )
    except GateError as error:
        failure = error
    if found := sorted(WORK.glob(f"{reports.name}.*")):
        raise GateError(f"{test}: {len(found)} sanitizer reports, the first:\n{found[0].read_text()[:6000]}")
    if failure is not None:
        raise failure
    return summary(output)
