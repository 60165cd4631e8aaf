"""Properties that hold for every input; hypothesis looks for one for which they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES, KINDS, NORMALIZATIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problem import Problem

import lgd_kernels as lgd

pytestmark = pytest.mark.usefixtures("backend")
# the fixture only chooses the backend, so that it need not run anew for every example
over_inputs = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
kinds = st.sampled_from(sorted(KINDS))


@st.composite
def problems(draw, dtypes=DTYPES, values=None, max_classes=40):
    """Any kind of H, shape, class axis, values (also infinite and NaN), labels, ignored rows and weights."""
    C = draw(st.integers(1, max_classes))
    dims = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    axis = draw(st.integers(0, len(dims)))
    shape = (*dims[:axis], C, *dims[axis:])
    dtype = draw(st.sampled_from(dtypes))
    if values is None:
        bound = draw(st.sampled_from([1.0, 10.0, 30000.0]))
        values = st.floats(-bound, bound, width=32) | st.sampled_from([0.0, 1.0, -np.inf])
    logits = torch.as_tensor(draw(hnp.arrays(np.float32, shape, elements=values))).to(dtype)
    ignore_index = draw(st.sampled_from([-100, 0]))
    labels = torch.as_tensor(draw(hnp.arrays(np.int64, dims, elements=st.integers(0, C - 1))))
    weight = None
    if draw(st.booleans()):
        weight = torch.as_tensor(draw(hnp.arrays(np.float32, dims, elements=st.floats(-4, 4, width=16))))
    torch.manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):  # other strides
        order = draw(st.permutations(range(len(shape))))
        logits = logits.permute(order).contiguous().permute(np.argsort(order).tolist())
    H, dense = KINDS[draw(kinds)](C)
    return Problem(logits, labels, H, dense, axis=axis, sample_weight=weight, ignore_index=ignore_index)


@given(problems(), st.sampled_from(["none", "sum", "mean"]), st.sampled_from(NORMALIZATIONS))
@over_inputs
def test_loss_and_gradient(problem, reduction, normalization):
    problem.check(reduction, normalization if reduction == "mean" else None)


@given(problems(values=st.floats(width=32, allow_subnormal=False)), st.sampled_from(["none", "sum"]))
@over_inputs
def test_any_bits_at_all(problem, reduction):
    """NaN, infinities, numbers at the end of the range: PyTorch's answer, and never a crash."""
    logits = problem.logits.detach().requires_grad_()
    loss = problem.loss(logits, reduction="none")
    rows = problem.exact
    np.testing.assert_array_equal(
        loss.detach().isnan().reshape(-1).numpy(force=True), np.isnan(rows.loss.astype(np.float64))
    )
    (grad,) = torch.autograd.grad(problem.loss(logits, reduction=reduction).sum(), logits)
    assert grad.shape == logits.shape
    ignored = (problem.labels == problem.ignore_index).unsqueeze(problem.axis)
    assert (grad[ignored.expand_as(grad)] == 0).all()


FINITE = st.floats(-10, 10, width=16)
REAL = (torch.float32, torch.float64)


@given(problems(dtypes=REAL, values=FINITE), st.sampled_from([1.0, -64.0, 1024.0]))
@over_inputs
def test_a_common_offset_changes_nothing(problem, offset):
    """In float64, where these offsets are added without rounding."""
    x = problem.logits.double()
    options = {"axis": problem.axis, "sample_weight": problem.sample_weight, "reduction": "none"}
    losses = [lgd.softmax_infogain_loss(y, problem.labels, problem.H, **options) for y in (x, x + offset)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-10)


@given(problems(dtypes=REAL, values=FINITE))
@over_inputs
def test_rows_of_the_gradient_sum_to_zero(problem):
    """s_l sum_j p_j - sum_j H[l, j] = 0: the loss does not see a common offset."""
    logits = problem.logits.double().requires_grad_()
    loss = problem.loss(logits, reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    size = 1 + problem.dense.abs().sum() * 4
    assert (grad.sum(problem.axis).abs() <= 1e-13 * size).all()


@given(problems(dtypes=REAL, values=FINITE), st.randoms(use_true_random=False))
@over_inputs
def test_permuted_rows_give_permuted_losses(problem, random):
    flat = Problem(
        problem.logits.movedim(problem.axis, -1).reshape(-1, problem.logits.shape[problem.axis]),
        problem.labels.reshape(-1),
        problem.H,
        problem.dense,
    )
    order = list(range(len(flat.labels)))
    random.shuffle(order)
    permuted = Problem(flat.logits[order], flat.labels[order], flat.H, flat.dense)
    torch.testing.assert_close(permuted.loss(reduction="none"), flat.loss(reduction="none")[order])
    torch.testing.assert_close(permuted.loss(reduction="sum"), flat.loss(reduction="sum"))


@given(problems(dtypes=REAL, values=FINITE), st.randoms(use_true_random=False))
@over_inputs
def test_permuted_classes_change_nothing(problem, random):
    C = problem.logits.shape[problem.axis]
    order = list(range(C))
    random.shuffle(order)
    logits = problem.logits.double().index_select(problem.axis, torch.tensor(order))
    labels = torch.argsort(torch.tensor(order))[problem.labels]
    H = lgd.Infogain.dense(problem.dense[order][:, order])
    options = {"axis": problem.axis, "reduction": "none"}
    permuted = lgd.softmax_infogain_loss(logits, labels, H, **options)
    torch.testing.assert_close(
        permuted, lgd.softmax_infogain_loss(problem.logits.double(), problem.labels, problem.H, **options)
    )


@given(problems(dtypes=REAL, values=FINITE), problems(dtypes=REAL, values=FINITE), st.floats(-3, 3))
@over_inputs
def test_the_loss_is_linear_in_H(problem, other, factor):
    C = problem.logits.shape[problem.axis]
    torch.manual_seed(1)
    A, B = problem.dense, torch.randn(C, C, dtype=torch.float64)

    def loss(matrix):
        H = lgd.Infogain.dense(matrix)
        return lgd.softmax_infogain_loss(
            problem.logits.double(), problem.labels, H, axis=problem.axis, reduction="none"
        )

    torch.testing.assert_close(loss(A + factor * B), loss(A) + factor * loss(B), rtol=1e-10, atol=1e-10)


@given(problems(dtypes=REAL, values=FINITE))
@over_inputs
def test_every_way_to_store_H_gives_the_same_loss(problem):
    logits, options = problem.logits.double(), {"axis": problem.axis, "reduction": "none"}
    expected = lgd.softmax_infogain_loss(logits, problem.labels, problem.H, **options)
    dense = problem.dense
    sparse = lgd.Infogain.sparse((dense - 0.25).to_sparse(), background=0.25)
    sparse = lgd.Infogain("sparse", len(dense), sparse.parts._replace(values=sparse.parts.values + 0.25))
    for H in (lgd.Infogain.dense(dense), lgd.Infogain.sparse(dense), sparse):
        torch.testing.assert_close(lgd.softmax_infogain_loss(logits, problem.labels, H, **options), expected)


@given(problems(dtypes=REAL, values=FINITE))
@over_inputs
def test_with_non_negative_H_the_loss_is_not_negative(problem):
    H = lgd.Infogain.dense(problem.dense.abs())
    loss = lgd.softmax_infogain_loss(problem.logits, problem.labels, H, axis=problem.axis, reduction="none")
    assert (loss >= -1e-4 * problem.dense.abs().sum()).all()


@given(problems(dtypes=REAL, values=FINITE))
@over_inputs
def test_a_step_against_the_gradient_lowers_a_convex_loss(problem):
    """The loss is convex in the logits while s_l >= 0; its curvature is at most s_l / 2."""
    x = problem.logits.double().requires_grad_()
    matrix = problem.dense.abs()
    largest = max(1.0, matrix.sum(1).max().item())

    def loss(x):
        return lgd.softmax_infogain_loss(
            x, problem.labels, lgd.Infogain.dense(matrix), axis=problem.axis, reduction="sum"
        )

    before = loss(x)
    (grad,) = torch.autograd.grad(before, x)
    after = loss(x.detach() - grad / largest)
    assert after <= before + 1e-9 * (1 + before.abs())
