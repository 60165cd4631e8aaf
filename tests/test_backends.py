"""Which backend answers on a CUDA device: the table in backends.py. There need not be one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lgd_kernels import backends, ops

LAYER_OPS = {"local_residual", "decoupled_linear", "decoupled_linear_backward"}
OF_THE_LOSS = frozenset(name for name in ops.names() if name.startswith("softmax_infogain")) | {"count_labels"}
SERVED = OF_THE_LOSS | LAYER_OPS
needs_extension = pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not built")
pytestmark = needs_extension


@pytest.fixture
def cuda_kernels(monkeypatch):
    """The extension, as if it had been built with its CUDA kernels."""
    monkeypatch.setattr(backends, "_cuda_ops", lambda: SERVED)
    return backends.extension


@pytest.fixture
def triton_kernels():
    pytest.importorskip("triton")
    from lgd_kernels.triton_kernels import softmax_infogain

    return softmax_infogain


def logits(dtype: torch.dtype = torch.float32, classes: int = 5, *, rows_inside: bool = False) -> torch.Tensor:
    return torch.empty(2, 3, classes, dtype=dtype).mT if rows_inside else torch.empty(2, classes, 1, dtype=dtype)


def answers(op: str, x: torch.Tensor | None = None):
    return backends.implementation(op, "cuda", x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_answers_where_classes_lie_side_by_side(cuda_kernels, dtype):
    for op in OF_THE_LOSS - {"softmax_infogain_backward_matrix", "count_labels"}:
        assert answers(op, logits(dtype)) is cuda_kernels
        assert answers(op, logits(dtype, rows_inside=True)) is cuda_kernels
    assert answers("count_labels") is cuda_kernels


def test_triton_answers_the_rest(cuda_kernels, triton_kernels):
    apart = torch.empty(2, 5, 3)
    for op in OF_THE_LOSS - {"count_labels"}:
        assert answers(op, logits(torch.float64)) is triton_kernels
        assert answers(op, apart) is triton_kernels
        if op != "softmax_infogain_backward_matrix":
            assert answers(op, apart[:, :1]) is cuda_kernels  # one class has no distance to another
    assert answers("softmax_infogain_backward_matrix", logits()) is triton_kernels


def test_the_other_one_answers_for_what_is_missing(cuda_kernels, triton_kernels, monkeypatch):
    monkeypatch.setattr(backends, "_load_triton", lambda: ({}, "no module named triton"))
    assert answers("softmax_infogain", logits(torch.float64)) is cuda_kernels
    monkeypatch.undo()
    assert answers("softmax_infogain", logits()) is (cuda_kernels if backends._cuda_ops() else triton_kernels)


def test_one_can_be_forced(cuda_kernels, triton_kernels):
    for x in (logits(), logits(torch.float64), torch.empty(2, 5, 3)):
        with backends.force("cuda"):
            assert answers("softmax_infogain", x) is cuda_kernels
        with backends.force("triton"):
            assert answers("softmax_infogain", x) is triton_kernels
        for name in ("cpp", "reference"):
            with backends.force(name):
                assert answers("softmax_infogain", x) is backends.reference
    with backends.force("cuda"):
        assert backends.implementation("softmax_infogain", "cpu") is backends.reference


def test_what_has_no_kernel_is_plain_pytorch(cuda_kernels, monkeypatch):
    monkeypatch.setattr(backends, "_load_triton", lambda: ({}, "no module named triton"))
    for name in set(ops.names()) - SERVED:
        assert answers(name) is backends.reference


def test_cuda_answers_for_narrow_layers(cuda_kernels):
    assert answers("local_residual", torch.empty(2, 3, 500, dtype=torch.float64).mT) is cuda_kernels
    for name in LAYER_OPS:
        assert answers(name) is cuda_kernels


def test_triton_answers_for_wide_layers(cuda_kernels, triton_kernels):
    for name in LAYER_OPS - {"local_residual"}:
        kernels = backends.implementation(name, "cuda", wide=True)
        assert kernels.OPS and name in kernels.OPS
        with backends.force("cuda"):
            assert backends.implementation(name, "cuda", wide=True) is backends.reference


def test_triton_answers_for_layers_without_cuda_kernels(triton_kernels, monkeypatch):
    monkeypatch.setattr(backends, "_cuda_ops", frozenset)
    for name in LAYER_OPS:
        assert name in answers(name).OPS


@pytest.mark.parametrize(
    ("d_in", "d_out", "dtype", "dtype_of_weight", "wide"),
    [
        (128, 128, torch.float32, torch.float32, False),
        (129, 1, torch.float32, torch.float32, True),
        (1, 129, torch.float32, torch.float32, True),
        (0, 0, torch.float64, torch.float64, False),
        (8, 8, torch.float32, torch.bfloat16, False),
        (8, 8, torch.float32, torch.float16, False),
        (8, 8, torch.float16, torch.bfloat16, True),
        (8, 8, torch.float32, torch.float64, True),
    ],
)
def test_which_layers_are_wide(d_in, d_out, dtype, dtype_of_weight, wide):
    for stack in ((), (2,)):
        z, weight = torch.empty(*stack, 3, d_in, dtype=dtype), torch.empty(*stack, d_out, d_in, dtype=dtype_of_weight)
        assert backends.is_wide(z, weight) == wide


def test_the_widest_layer_is_that_of_the_kernels():
    config = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "decoupled_linear_config.h"
    assert f"constexpr int kMostWidth = {backends.WIDEST_ON_CUDA};" in config.read_text()


@pytest.mark.parametrize("mix", [("narrow", "wide", "narrow"), ("wide", "wide"), ("narrow",)])
def test_every_stack_of_a_list_is_answered_by_itself(monkeypatch, mix):
    """Forward and backward: stacks and single layers, numbers for every layer, and upstream gradients."""
    monkeypatch.setattr(backends, "asks_for_width", lambda device_type: True)
    seen = []

    def implementation(op, device_type, wide=False):
        seen.append(wide)
        return backends.reference

    monkeypatch.setattr(backends, "implementation", implementation)
    shapes = [((2, 3, 130) if kind == "wide" else (3, 4), (2, 5, 130) if kind == "wide" else (5, 4)) for kind in mix]
    z, weight = ([torch.randn(shape[i]) for shape in shapes] for i in range(2))
    outputs = [torch.randn(*x.shape[:-1], 5) for x in z]
    T = sum(2 if kind == "wide" else 1 for kind in mix)
    numbers = [1.0 + t for t in range(T)]
    yes = [True] * len(mix)
    codes, skip = [t % 9 for t in range(T)], [0.0] * T
    forward = (z, weight, [None] * len(mix), outputs, [None] * len(mix), codes, True, 1, 0.7, numbers, skip, numbers)
    forward = (*forward, numbers, yes, yes)
    found, expected = ops.decoupled_linear(*forward), backends.reference.decoupled_linear(*forward)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    _, *made = expected
    backward = (z, weight, *made, torch.tensor(numbers), codes, True, skip, numbers, *[yes] * 5)
    expected = backends.reference.decoupled_linear_backward(*backward)
    torch.testing.assert_close(ops.decoupled_linear_backward(*backward), expected, rtol=0, atol=0)
    assert sorted(seen) == sorted([kind == "wide" for kind in set(mix)] * 2)


def test_what_is_not_built_cannot_be_forced(monkeypatch):
    monkeypatch.setattr(backends, "_cuda_ops", frozenset)
    with pytest.raises(RuntimeError, match=r"^name: backend 'cuda' is not built; install nvcc"):
        backends.force("cuda").__enter__()


def test_the_environment_variable():
    """On a machine with CUDA kernels it is taken; without, it says what is missing."""
    code = "import lgd_kernels; lgd_kernels.show_backends()"
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LGD_BACKEND": "cuda", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
    )
    if backends.extension.cuda_ops():
        assert "LGD_BACKEND=cuda" in completed.stdout
    else:
        assert completed.stderr.splitlines()[-1].startswith(
            "RuntimeError: LGD_BACKEND: backend 'cuda' is not built; install nvcc"
        )


def test_show_backends_with_cuda_kernels(cuda_kernels, monkeypatch, capsys):
    monkeypatch.setattr(cuda_kernels, "cuda_version", lambda: 13010)
    backends.show_backends()
    output = capsys.readouterr().out
    assert "CUDA kernels        yes: built with CUDA 13.1\n" in output
    lines = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line}
    assert lines["softmax_infogain"] == ["cpp", "cuda"]
    assert lines["decoupled_step_"] == ["cpp", "triton"]
    assert "decoupled_step_     on CUDA: products by fused tiles, by cuBLAS from width 4096 (16 bits)" in output


def test_every_op_passes_its_logits_on(monkeypatch):
    """Also the one that has others before them."""
    seen = []

    def implementation(op, device_type, logits):
        seen.append(logits)
        return backends.reference

    monkeypatch.setattr(backends, "implementation", implementation)
    x, labels, per_row = torch.randn(2, 5, 3), torch.randint(5, (2, 3)), torch.rand(2, 3)
    rows = (x, labels, *[None] * 6, -100, 0.0)
    ops.softmax_infogain(*rows, per_row, False, False)
    ops.softmax_infogain_backward_(torch.zeros(2, 5, 3), per_row, *rows, per_row, None)
    assert len(seen) == 2
    assert all(tensor.data_ptr() == x.data_ptr() and tensor.shape == x.shape for tensor in seen)
