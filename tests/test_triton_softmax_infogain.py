"""The Triton kernels without a GPU: the tests of softmax_infogain in Triton's interpreter, each group in a process of
its own because a process either interprets or compiles; and two kernels compiled ahead of time (`make gates`: all)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgd_kernels import backends, ops
from tools.gates.triton_ahead_of_time import Variant, compile_variant

pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

HERE = Path(__file__).parent


@pytest.mark.interpreted("test_softmax_infogain.py", "interpreted_softmax_infogain.py")
def test_in_the_interpreter(interpreted):
    pass


@pytest.mark.interpreted("test_softmax_infogain.py", "--tiles=small")
def test_in_the_interpreter_with_small_tiles(interpreted):
    pass


@pytest.mark.parametrize(
    "variant",
    [
        Variant("forward", "dense_float32", "bfloat16", "row", 90),
        Variant("forward", "identity", "float32", "twice", 90),
    ],
    ids=lambda variant: variant.name,
)
def test_compiled_ahead_of_time(variant):
    """No spills; loads and stores of 16 bytes."""
    report, _ = compile_variant(variant)
    assert report.stack == 0
    assert report.wide_loads > 0
    assert report.wide_stores > 0


def test_tiles():
    from lgd_kernels.triton_kernels.common import Tiles, alignment, tiles_for

    half = torch.bfloat16
    assert tiles_for(10, 1, half, 90) == Tiles(rows=32, classes=16, whole=True, num_warps=4)
    assert tiles_for(1000, 1, half, 90) == Tiles(rows=1, classes=1024, whole=True, num_warps=1)
    assert tiles_for(32768, 1, half, 90) == Tiles(rows=1, classes=32768, whole=True, num_warps=32)
    assert tiles_for(32769, 1, half, 90) == Tiles(rows=1, classes=16384, whole=False, num_warps=32)
    assert tiles_for(32769, 1, half, 89).num_warps == 16
    assert tiles_for(24, 4096, half, 90) == Tiles(rows=32, classes=32, whole=True, num_warps=1)
    for dtype in (torch.float64, torch.float32, half):
        for kept in (1, 2, 4):
            for inner in (1, 7):
                for classes in (0, 1, 2, 3, 255, 256, 257, 5000, 16384, 50257, 2**20):
                    tiles = tiles_for(classes, inner, dtype, 80, kept)
                    assert tiles.whole == (tiles.classes >= classes) or classes > 1000
                    assert tiles == tiles_for(classes, inner and inner * 3 if inner > 1 else 1, dtype, 80, kept)
                    assert 1 <= tiles.num_warps <= 32
                    numbers = tiles.rows * tiles.classes * kept * (2 if dtype == torch.float64 else 1)
                    assert numbers <= 64 * 32 * tiles.num_warps  # registers of a thread
    assert alignment(2, 1000, 0, 8) == 8
    assert alignment(2, 1000, 1004) == 1
    assert alignment(8, 2) == 2


def test_a_float64_z_loss_stays_one():
    from lgd_kernels.triton_kernels import softmax_infogain

    for kernel in (softmax_infogain.softmax_infogain_kernel, softmax_infogain.double_backward_kernel):
        (z_loss,) = (parameter for parameter in kernel.params if parameter.name == "z_loss")
        assert z_loss.annotation_type == "fp64"


def test_which_ops_it_serves():
    from lgd_kernels.triton_kernels import decoupled_linear, decoupled_step, local_residual, softmax_infogain

    wanted = {name: softmax_infogain for name in ops.names() if name.startswith("softmax_infogain")}
    wanted |= {"count_labels": softmax_infogain, "local_residual": local_residual}
    wanted |= dict.fromkeys(("decoupled_linear", "decoupled_linear_backward"), decoupled_linear)
    wanted |= {"decoupled_step_": decoupled_step}
    for name in ops.names():
        for forced in ("auto", "triton"):
            with backends.force(forced):
                assert backends.implementation(name, "cuda") is wanted.get(name, backends.reference)
        with backends.force("triton"):  # CPU tensors only in the interpreter
            assert backends.implementation(name, "cpu") is backends.reference
        with backends.force("reference"):
            assert backends.implementation(name, "cuda") is backends.reference


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_checking_labels_on_a_device(wanted):
    """LGD_CHECK_LABELS, on a device that is the CPU in disguise."""
    code = (
        "import torch; from lgd_kernels import ops\n"
        "rows = torch.randn(2, 3, 1), torch.tensor([[0], [7]]), *[None] * 6, -100, 0.0\n"
        "ops._check_labels = lambda name, args: print('checked', name)\n"
        "ops.backends.implementation = lambda name, *_: ops.backends.reference\n"
        "try: ops._answer('softmax_infogain', 'cuda', 0, *rows, None, False, False)\n"
        "except IndexError as error: print(error)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LGD_CHECK_LABELS": wanted, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.startswith("checked softmax_infogain\n") == (wanted == "1")


def test_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import lgd_kernels; from lgd_kernels import backends, reference\n"
        "assert backends.implementation('softmax_infogain', 'cuda') is reference\n"
        "assert 'Triton              no: ' in backends.describe()\n"
        "try: backends.force('triton').__enter__()\n"
        "except RuntimeError as error: print(error)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.startswith("name: backend 'triton' is not there (")
