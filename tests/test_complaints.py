"""What users of other losses complain about, one named test for each complaint: ours must not have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import KINDS, SOME_KINDS, make_labels
from oracle import array
from problem import Problem
from torch import nn

import lgd_kernels as lgd
from lgd_kernels import ops

pytestmark = pytest.mark.usefixtures("backend")
by_some_kinds = pytest.mark.parametrize("kind", SOME_KINDS)
INF = float("inf")


def make(kind: str, N: int, C: int, dtype: torch.dtype = torch.float32, **options) -> Problem:
    return Problem((torch.randn(N, C) * 3).to(dtype), torch.randint(C, (N,)), *KINDS[kind](C), **options)


def test_complaint_01_factor_s_l_is_kept():
    problem = make("dense_large_row_sums", 8, 21, torch.float64)
    s = problem.dense.sum(1)[problem.labels]
    assert (s > 20).all()
    x = problem.logits.requires_grad_()
    loss = problem.loss(reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    torch.testing.assert_close(grad, s[:, None] * torch.softmax(x, 1) - problem.dense[problem.labels])
    torch.testing.assert_close(grad.sum(1), torch.zeros(8, dtype=torch.float64))  # a common offset changes nothing
    step, change = 1e-4, torch.randn(8, 21, dtype=torch.float64)
    with torch.no_grad():
        difference = problem.loss(x + step * change, reduction="none") - problem.loss(
            x - step * change, reduction="none"
        )
    torch.testing.assert_close(difference / (2 * step), (grad * change).sum(1), rtol=1e-6, atol=1e-6)


@by_some_kinds
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_complaint_02_logits_are_not_overwritten(kind, upstream):
    problem = make(kind, 6, 21)
    logits = problem.logits.clone().requires_grad_()
    first = problem.loss(logits)
    second = logits.square().sum()  # reads the logits after the loss did
    (first * upstream + second).backward()
    assert torch.equal(logits, problem.logits)
    torch.testing.assert_close(second.detach(), problem.logits.square().sum())
    expected = upstream * problem.exact.grad / 6 + 2 * array(problem.logits)
    np.testing.assert_allclose(array(logits.grad), expected, rtol=1e-6, atol=1e-6)


@by_some_kinds
def test_complaint_03_every_row_gets_its_own_upstream_gradient(kind):
    problem = make(kind, 6, 21)
    for upstream in (
        torch.tensor([0.0, 1.0, -2.0, 3.0, 0.5, 1e4]),
        torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        torch.ones(1).expand(6),
    ):
        logits = problem.logits.clone().requires_grad_()
        loss = problem.loss(logits, reduction="none")
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        problem.assert_grad(grad, upstream, "none")


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999])
def test_complaint_04_no_cancellation_at_the_true_class_in_bfloat16(p):
    C = 16
    logits = torch.zeros(1, C, dtype=torch.bfloat16)
    logits[0, 3] = np.log(p * (C - 1) / (1 - p))
    problem = Problem(logits, torch.tensor([3]), *KINDS["none"](C))
    logits.requires_grad_()
    problem.loss().backward()
    expected = float(problem.exact.p[0, 3] - 1)
    assert abs(logits.grad[0, 3].item() - expected) <= 2**-8 * abs(expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_complaint_06_ignored_rows_are_right_when_compiled(reduction):
    problem = make("dense_negative", 8, 21)
    problem.labels[[0, 3, 7]] = -100
    problem.logits[3] = torch.nan
    torch.compiler.reset()

    def run(logits):
        return problem.loss(logits, reduction=reduction)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    logits = problem.logits.clone().requires_grad_()
    loss = compiled(logits)
    problem.assert_loss(loss, reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    problem.assert_grad(grad, torch.ones(8) if reduction == "none" else 1.0, reduction)
    assert (grad[[0, 3, 7]] == 0).all()


# Memory that nobody touches costs nothing: a view of few elements far apart reaches offsets beyond 2^31.
FAR = 2**30


def far_apart(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The values at those strides."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    assert size > 2**31
    return torch.empty(size, dtype=values.dtype).as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize(
    ("shape", "strides", "axis"),
    [
        ((3, 19), (FAR, 1), 1),
        ((4, 3), (1, FAR), 1),
        ((2, 19, 3), (19, 1, FAR), 1),
        ((3, 19, 4), (FAR, 4, 1), 1),
        ((3, 4, 19), (FAR, 19, 1), 2),
    ],
    ids=["rows", "classes", "inner", "outer", "last axis"],
)
def test_complaint_07_logits_beyond_32_bit_offsets(shape, strides, axis):
    values = (torch.randn(shape) * 3).to(torch.bfloat16)
    labels = make_labels(values, axis)
    logits = far_apart(values, strides)
    for reduction in ("none", "mean"):
        Problem(logits, labels, *KINDS["dense_negative"](shape[axis]), axis=axis).check(reduction)


def test_complaint_07_a_dense_H_beyond_32_bit_offsets():
    matrix = torch.rand(3, 3).to(torch.bfloat16)
    for strides in ((FAR, 1), (1, FAR)):
        H = lgd.Infogain.dense(far_apart(matrix, strides))
        Problem(torch.randn(6, 3), torch.arange(6) % 3, H, matrix.double()).check("none")


def test_complaint_07_labels_and_weights_beyond_32_bit_offsets():
    labels = far_apart(torch.tensor([2, 1, 0], dtype=torch.uint8), (FAR,))
    weight = far_apart(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16), (FAR,))
    Problem(torch.randn(3, 5), labels, *KINDS["dense_negative"](5), sample_weight=weight).check("none")


def test_complaint_07_a_gradient_beyond_32_bit_offsets():
    problem = make("none", 3, 19, torch.bfloat16)
    grad = far_apart(torch.full((3, 19, 1), torch.nan, dtype=torch.bfloat16), (FAR, 1, 1))
    rows = (problem.logits.unsqueeze(2), problem.labels.unsqueeze(1), *[None] * 6, -100, 0.0)
    upstream = torch.tensor([[1.0], [2.0], [3.0]])
    ops.softmax_infogain_backward_(grad, torch.zeros(3, 1), *rows, upstream, None)
    problem.assert_grad(grad.squeeze(2), upstream, "none")


def test_complaint_07_more_than_2_31_contiguous_elements(compiled):
    N, C = 2**16 + 3, 2**15
    logits = torch.empty(N, C, dtype=torch.bfloat16)
    labels = torch.full((N,), -100)
    used = torch.tensor([0, N // 2, N - 3, N - 1])  # the others are not even read
    labels[used] = torch.tensor([0, 7, C - 2, C - 1])
    logits[used] = torch.randn(4, C).to(torch.bfloat16)
    loss = lgd.softmax_infogain_loss(logits, labels, reduction="none")
    assert loss.count_nonzero() == 4
    alone = lgd.softmax_infogain_loss(logits[used], labels[used], reduction="none")
    assert torch.equal(loss[used], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complaint_08_minus_infinity_times_zero_is_zero(dtype):
    logits = torch.randn(5, 40).to(dtype)
    logits[:, 3::4] = -INF
    labels = torch.arange(0, 20, 4)
    stored = torch.eye(40)
    for H in (None, lgd.Infogain.dense(stored), lgd.Infogain.sparse(stored), lgd.Infogain.diagonal(torch.ones(40))):
        Problem(logits, labels, H, stored.double()).check("none")
        x = logits.clone().requires_grad_()
        loss = lgd.softmax_infogain_loss(x, labels, H)
        loss.backward()
        assert loss.isfinite()
        assert (x.grad[:, 3::4] == 0).all()


def test_complaint_09_class_weights_do_not_distort_label_smoothing():
    logits, labels, weight = torch.randn(6, 5), torch.randint(5, (6,)), torch.rand(5) * 4
    for reduction in ("none", "sum", "mean"):
        options = {"weight": weight, "label_smoothing": 0.3, "reduction": reduction}
        ours, theirs = lgd.SoftmaxInfogainLoss(**options), nn.CrossEntropyLoss(**options)
        torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_complaint_10_the_mean_divides_by_what_pytorch_divides_by(weighted, label_smoothing):
    logits, labels = torch.randn(8, 5, 3), torch.randint(5, (8, 3))
    labels[:3] = -100
    weight = torch.rand(5) * 4 if weighted else None
    options = {"weight": weight, "label_smoothing": label_smoothing}
    grads = []
    for crit in (lgd.SoftmaxInfogainLoss(**options), nn.CrossEntropyLoss(**options)):
        x = logits.clone().requires_grad_()
        loss = crit(x, labels)
        loss.backward()
        grads += [loss.detach(), x.grad]
    torch.testing.assert_close(grads[:2], grads[2:])
    # a sample weight does not change what is divided by
    loss = lgd.softmax_infogain_loss(logits, labels, sample_weight=torch.full((8, 3), 2.0))
    torch.testing.assert_close(loss, 2 * nn.functional.cross_entropy(logits, labels))


def test_complaint_11_labels_out_of_range_raise_and_write_nowhere(raising_labels):
    logits = torch.randn(4, 5, requires_grad=True)
    for label in (5, 255, -1, 2**40):
        with pytest.raises(IndexError, match=f"labels: value {label} at position 2 is out of range for 5 classes"):
            lgd.softmax_infogain_loss(logits, torch.tensor([0, 1, label, 3]))


@pytest.mark.usefixtures("nan_prefill")  # and deterministic algorithms for the reference, which is plain PyTorch
@pytest.mark.parametrize("kind", [*SOME_KINDS, "label_smoothing"])
def test_complaint_12_runs_give_the_same_bits(kind):
    problem = make(kind, 500, 129, sample_weight=torch.rand(500))
    runs = []
    for _ in range(4):
        logits, weight = problem.logits.requires_grad_(), problem.sample_weight.requires_grad_()
        loss, norm = problem.loss(return_grad_norm=True)
        (made_in_forward,) = torch.autograd.grad(problem.loss(), logits)
        grads = torch.autograd.grad(loss, (logits, weight), create_graph=True)
        runs.append([loss, norm, made_in_forward, *grads, *torch.autograd.grad(grads[0].square().sum(), logits)])
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("nan_prefill")
def test_complaint_12_the_gradient_of_H_has_the_same_bits():
    matrix = torch.rand(129, 129, requires_grad=True)
    logits, labels = torch.randn(2000, 129), torch.randint(129, (2000,))
    runs = [
        torch.autograd.grad(lgd.softmax_infogain_loss(logits, labels, lgd.Infogain.dense(matrix)), matrix)[0]
        for _ in range(4)
    ]
    assert all(torch.equal(runs[0], run) for run in runs)


@pytest.mark.parametrize("offset", [1e4, -1e4, 2.0**20])
@by_some_kinds
def test_complaint_13_a_common_offset_changes_nothing(kind, offset):
    """Logits on a grid, so that the offset is added without rounding."""
    problem = make(kind, 9, 35)
    problem.logits = (problem.logits * 8).round() / 8
    for reduction in ("none", "mean"):
        logits = (problem.logits + offset).requires_grad_()
        assert torch.equal(logits.detach() - offset, problem.logits)
        loss = problem.loss(logits, reduction=reduction)
        problem.assert_loss(loss, reduction)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        problem.assert_grad(grad, torch.ones(9) if reduction == "none" else 1.0, reduction)


@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"normalization": "none"}], ids=["sum", "none"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_complaint_14_micro_batches_add_up_to_the_whole_batch(weighted, options):
    """However the ignored rows fall: the user divides once, by the count of the whole batch."""
    N, C = 24, 13
    problem = make("dense_negative", N, C, sample_weight=torch.rand(N) if weighted else None)
    problem.labels[[1, 2, 3, 4, 5, 9, 20]] = -100
    valid = int((problem.labels != -100).sum())
    logits = problem.logits.clone().requires_grad_()
    for rows in torch.arange(N).split([7, 1, 5, 11]):
        loss = lgd.softmax_infogain_loss(
            logits[rows],
            problem.labels[rows],
            problem.H,
            sample_weight=None if problem.sample_weight is None else problem.sample_weight[rows],
            **options,
        )
        (loss / valid).backward()
    problem.assert_grad(logits.grad)
