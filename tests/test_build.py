"""What is built, what answers, and that every build and instruction set gives the same results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fixed_results
import pytest
import torch

import lgd_kernels as lgd
from lgd_kernels import backends, ops

pytestmark = pytest.mark.cpu

HERE = Path(__file__).resolve().parent
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not built")


def report_of(tmp_path, *options: str, **environment: str) -> dict:
    """What tests/fixed_results.py says of the package in a process of its own; "results" are its results."""
    file = tmp_path / "results.npz"
    completed = subprocess.run(
        [sys.executable, HERE / "fixed_results.py", file, *options],
        env={**os.environ, "LGD_BACKEND": "auto", **environment},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    return {**json.loads(completed.stdout.splitlines()[-1]), "results": fixed_results.load(file)}


@pytest.fixture(scope="module")
def truth() -> fixed_results.Results:
    with backends.force("reference"):
        return fixed_results.results("float64")


def check(report: dict, truth: fixed_results.Results) -> None:
    for dtype, found in report["results"].items():
        assert fixed_results.differences(found, truth, dtype) == []


@needs_extension
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_gives_the_same_results(tmp_path, truth, capability):
    if CAPABILITIES.index(capability) > CAPABILITIES.index(backends.extension.cpu_capability()):
        pytest.skip(f"this CPU does not have {capability}")
    report = report_of(tmp_path, ATEN_CPU_CAPABILITY=capability.lower())
    assert report["capability"] == capability
    assert report["warnings"] == []
    check(report, truth)


def test_the_reference_gives_the_same_results(tmp_path, truth):
    report = report_of(tmp_path, LGD_BACKEND="reference")
    assert "LGD_BACKEND=reference" in report["describe"]
    assert not re.search(r"^softmax_infogain .*cpp", report["describe"], re.MULTILINE)
    assert report["warnings"] == []
    check(report, truth)


def test_without_the_extension(tmp_path, truth):
    report = report_of(tmp_path, "--without-extension", "--refused", "cpp", "nonsense")
    assert report["capability"] is None
    (warning,) = report["warnings"]
    assert "plain PyTorch reference" in warning and "to get the fast kernels, install g++" in warning
    assert report["later warnings"] == []
    assert report["refused"]["cpp"].startswith("RuntimeError: LGD_BACKEND: backend 'cpp' is not built")
    assert report["refused"]["nonsense"].startswith("ValueError: LGD_BACKEND: unknown backend 'nonsense'")
    assert "compiled extension  no:" in report["describe"]
    check(report, truth)


def test_show_backends_names_every_op(capsys):
    lgd.show_backends()
    printed = capsys.readouterr().out
    assert printed == backends.describe() + "\n"
    assert torch.__version__ in printed
    for name in ops.names():
        assert re.search(rf"^{name} +(cpp|reference) +(triton|reference)$", printed, re.MULTILINE)


@needs_extension
def test_show_backends_on_the_extension():
    with backends.force("auto"):
        text = backends.describe()
    assert re.search(r"built for .*DEFAULT, AVX2, AVX512 with .*\d", text)
    assert f"this CPU runs       {torch.backends.cpu.get_cpu_capability()}" in text
    assert re.search(r"^softmax_infogain +cpp", text, re.MULTILINE)


def test_the_module_prints_the_same():
    command = [sys.executable, "-m", "lgd_kernels"]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert completed.returncode == 0, completed.stderr
    first_line = f"lgd_kernels on torch {torch.__version__}"
    assert completed.stdout.startswith(first_line)
    assert all(name in completed.stdout for name in ops.names())


@needs_extension
def test_every_op_answers_from_the_backend_it_names():
    compiled = [name for name in ops.names() if backends.has_kernel(name, "cpu")]
    assert "softmax_infogain" in compiled
    for name in ops.names():
        with backends.force("auto"):
            assert (backends.implementation(name, "cpu") is backends.extension) == (name in compiled)
        with backends.force("reference"):
            assert backends.implementation(name, "cpu") is backends.reference
