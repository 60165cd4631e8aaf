"""Runs a part of the tests under compute-sanitizer, all its tools side by side."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tools.gpu.commands import FOLDER, Ended, run_together
from tools.gpu.stages import FAILED, PASSED, SKIPPED, STOPPED, Outcome

REPORTED = 86  # exit status for a report
OUR_NAMESPACE = "lgd3gpu"  # as it is written in the names of the kernels in csrc/cuda
# what kernels do, and in which files: rows of all lengths, columns, special values, second derivatives, gradients of H;
# layers of all activations, whatever their strides, and the updates of a visit
SUBJECTS = {
    "loss": (
        ("test_softmax_infogain.py",),
        "test_loss_and_gradient or class_counts or test_long_rows or special_rows or second_derivative or "
        "gradient_of_the_tensors or corrected_where_it_must_be",
    ),
    "layers": (
        ("test_local_residual.py", "test_decoupled_linear.py", "test_decoupled_step.py"),
        "energies_and_gradients or of_their_own or unequal_widths or strides or visits_with_an_optimizer or "
        "softmax_infogain_head",
    ),
}
TOOLS = [(tool, "cuda") for tool in ("memcheck", "racecheck", "initcheck", "synccheck")] + [("memcheck", "triton")]


def find() -> str | None:
    """compute-sanitizer, on the PATH or where CUDA is installed."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(program: str, tool: str, backend: str, subject: str) -> list[str]:
    """The tests of one backend under one tool."""
    options = ["--tool", tool, "--error-exitcode", str(REPORTED), "--log-file", str(report(tool, backend, subject))]
    options += ["--report-api-errors", "no"]  # torch asks the driver for functions that it may not have
    if backend == "cuda" and tool != "initcheck":  # which has to see who else writes the memory
        options += ["--kernel-name", f"kns={OUR_NAMESPACE}"]
    tests = [sys.executable, "-m", "pytest", "-p", "tools.gates.pytest_plugin", "-p", "no:cacheprovider", "--tb=short"]
    files, expression = SUBJECTS[subject]
    tests += ["--cover=1", f"--backend={backend}", "--device=cuda", "-k", expression]
    return [program, *options, *tests, *(f"tests/{name}" for name in files)]


def report(tool: str, backend: str, subject: str) -> Path:
    return FOLDER / f"report-{tool}-{backend}-{subject}.txt"


def sanitizer(seconds: float) -> Outcome:
    """memcheck, racecheck, initcheck and synccheck on the CUDA kernels, memcheck on Triton's."""
    if (program := find()) is None:
        return Outcome(SKIPPED, "compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin")
    checks = [(tool, backend, subject) for tool, backend in TOOLS for subject in SUBJECTS]
    commands = {"-".join(check): command(program, *check) for check in checks}
    # a block of memory for each tensor: what lies side by side in one block may be overrun unseen
    return judged(run_together(commands, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def judged(ended: dict[str, Ended]) -> Outcome:
    """One outcome for all tools."""
    words = {None: "not done", 0: "no report", REPORTED: "REPORTS"}
    details = ", ".join(f"{name}: {words.get(e.status, 'failing tests')}" for name, e in ended.items())
    statuses = {e.status for e in ended.values()}
    if statuses - {None, 0}:
        return Outcome(FAILED, f"{details}; see build/gpu/report-*.txt and the logs beside them")
    return Outcome(STOPPED if None in statuses else PASSED, details)
