"""The CUDA kernels of softmax_infogain, run on this CPU (cuda_on_host), against the equations in extended precision.

Here is a sample of every kernel; `make gates` runs all of test_softmax_infogain.py on them, under sanitizers.
"""

from __future__ import annotations

import numpy as np
import pytest
import test_softmax_infogain
import torch
from cases import DTYPES, SOME_KINDS, dtype_name, make_labels
from cuda_on_host import MODES, Configuration, Kernels
from oracle import array
from problem import Problem
from test_softmax_infogain import KINDS, LAYOUTS, add_special_rows, make, sharpened
from tolerance import assert_accurate

from lgd_kernels import backends, ops

pytestmark = pytest.mark.cpu

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
by_some_kinds = pytest.mark.parametrize("kind", SOME_KINDS)

# Each with a number of classes that it is for. In small blocks few classes fill several threads, warps and blocks.
CONFIGURATIONS = {
    "one lane": (Configuration("register_lanes", 1), 16),
    "lanes": (Configuration("register_lanes", 4), 56),
    "warp": (Configuration("register_lanes", 32), 456),
    "block": (Configuration("register_block", threads=96), 1016),
    "cluster": (Configuration("register_block", threads=64, cluster=2), 1000),
    "shared, one lane": (Configuration("shared_lanes", 1), 7),
    "shared, lanes": (Configuration("shared_lanes", 2, threads=64), 10),
    "shared, warp": (Configuration("shared_lanes", 32, threads=96), 203),
    "shared, block": (Configuration("shared_block", threads=96), 1001),
    "shared, cluster": (Configuration("shared_block", threads=32, cluster=4), 403),
    "stream": (Configuration("stream", threads=64), 997),
    "stream of vectors": (Configuration("stream", threads=64), 2008),
    "columns": (Configuration("columns", 4, 128), 90),
    "one warp of columns": (Configuration("columns", 1, 64), 21),
}
by_configuration = pytest.mark.parametrize("kernels", CONFIGURATIONS, indirect=True)


@pytest.fixture
def kernels(request, cuda_on_host_library, nan_prefill, monkeypatch) -> Kernels:
    """The kernels in one of CONFIGURATIONS, or the one chosen for the input; they answer for the ops."""
    name = getattr(request, "param", None)
    kernels = Kernels(cuda_on_host_library, None if name is None else CONFIGURATIONS[name][0])
    kernels.run_in_reverse(name is not None and list(CONFIGURATIONS).index(name) % 2 == 1)
    reference = backends.reference
    monkeypatch.setattr(backends, "implementation", lambda op, *_: kernels if hasattr(kernels, op) else reference)
    return kernels


@pytest.fixture
def classes(request) -> int:
    """The number of classes that the configuration is for."""
    return CONFIGURATIONS[request.node.callspec.params["kernels"]][1]


def check_everything(problem: Problem) -> None:
    """Loss, lse, norm and gradient, for upstream gradients of loss and lse."""
    logits = problem.logits.detach().requires_grad_()
    loss, lse, norm = problem.loss(logits, reduction="none", return_lse=True, return_grad_norm=True)
    problem.assert_loss(loss, "none")
    problem.assert_per_row(lse, "lse")
    problem.assert_per_row(norm, "norm")
    upstream, of_lse = torch.randn_like(loss), torch.randn_like(lse)
    (grad,) = torch.autograd.grad([loss, lse], logits, [upstream, of_lse])
    problem.assert_grad(grad, upstream, "none", upstream_of_lse=of_lse)


# ---------------------------------------------------------------------------------------------------------------------
# The harness itself
# ---------------------------------------------------------------------------------------------------------------------


def misused(kernels: Kernels, which: int) -> tuple[str, torch.Tensor]:
    result = torch.full((64,), torch.nan)
    return kernels.misuse(which, result), result


def test_a_right_kernel_is_not_reported(kernels):
    report, result = misused(kernels, 0)
    assert report == ""
    assert torch.equal(result, torch.arange(64.0))


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (1, "block 0, thread (0, 0) is at a block barrier that block 0, thread (5, 0) skips: it has finished"),
        (4, "block 0, thread (0, 0) waits at a shuffle or vote for block 0, thread (1, 0), which has finished"),
        (5, "block 0, thread (0, 0): calls a shuffle or vote whose mask does not name it"),
        (6, "block 0, thread (0, 0): a shuffle reads lane 1, which its mask does not name"),
        (7, "block 0, thread (0, 0) is at a cluster barrier that block 1, thread (0, 0) skips: it has finished"),
    ],
)
def test_misuse_is_reported(kernels, which, expected):
    report, _ = misused(kernels, which)
    assert report == f"misuse::kernel<{which}>: {expected}"


def test_a_missing_barrier_gives_wrong_results(kernels):
    _, result = misused(kernels, 3)
    assert result.isnan().any()


def test_an_unwritten_output_stays_nan(kernels):
    _, result = misused(kernels, 8)
    assert result.isnan().nonzero().flatten().tolist() == [56]


# ---------------------------------------------------------------------------------------------------------------------
# The configuration
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        ((10, 4), {"aligned": False}, Configuration("shared_lanes", 2, 128)),
        ((10, 2), {"aligned": False}, Configuration("shared_lanes", 2, 128)),
        ((64, 4), {}, Configuration("register_lanes", 16, 128)),
        ((1000, 4), {}, Configuration("register_lanes", 32, 128)),
        ((1001, 4), {"aligned": False}, Configuration("shared_lanes", 32, 128)),
        ((8192, 2), {}, Configuration("register_block", 0, 128)),
        ((32000, 2), {}, Configuration("register_block", 0, 256, 2)),
        ((128256, 2), {}, Configuration("register_block", 0, 256, 8)),
        ((262144, 2), {}, Configuration("register_block", 0, 512, 8)),
        ((262144, 4), {}, Configuration("stream", 0, 512)),
        ((131072, 4), {}, Configuration("register_block", 0, 512, 8)),
        ((1000, 8), {}, Configuration("stream", 0, 128)),
        ((50257, 2), {"aligned": False}, Configuration("shared_block", 0, 416, 4)),
        ((32000, 2), {"compute_capability": 80}, Configuration("register_block", 0, 512)),
        ((128256, 2), {"compute_capability": 80}, Configuration("stream", 0, 512)),
        ((10, 4), {"aligned": False, "packed": False}, Configuration("stream", 0, 32)),
        ((19, 4), {"side_by_side": False, "aligned": False}, Configuration("columns", 1, 128)),
        ((1000, 4), {"side_by_side": False, "aligned": False}, Configuration("columns", 16, 512)),
    ],
)
def test_the_configuration_of_a_shape(kernels, arguments, options, expected):
    assert kernels.configure(*arguments, **options) == expected


def test_every_shape_has_a_configuration_that_fits(kernels):
    """`configure` asserts that it fits; here, that a launch accepts it."""
    sizes = [
        *range(1, 70),
        *(n + d for n in (128, 1000, 1024, 4096, 16384, 65536, 2**18, 2**20) for d in (-8, -1, 0, 1)),
    ]
    for size in sizes:
        for element_size in (2, 4, 8):
            for aligned in (False, True) if size * element_size % 16 == 0 else (False,):
                for packed in (False, True):
                    for capability in (80, 90, 120):
                        options = {"aligned": aligned, "packed": packed, "compute_capability": capability}
                        c = kernels.configure(size, element_size, **options)
                        assert c.threads % 32 == 0 and 32 <= c.threads <= 512 and c.cluster in (1, 2, 4, 8)
                        assert c.cluster == 1 or capability >= 90


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@by_configuration
@by_dtype
@by_some_kinds
def test_every_kernel(kernels, classes, kind, dtype):
    problem = make(kind, 5, classes, dtype, sample_weight=torch.rand(5) + 0.5, ignore_index=3, z_loss=0.01)
    problem.labels[2] = 3
    columns = kernels.configuration.mode == "columns"
    if columns:
        problem.logits = problem.logits.T.contiguous().T
    check_everything(sharpened(problem))
    assert kernels.used == ({"stream"} if dtype == torch.float64 and not columns else {kernels.configuration.mode})


@by_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", ["none", "dense_zero_row_sums", "sparse_background"])
def test_special_rows(kernels, classes, kind, dtype):
    """Among them masked classes where H is 0."""
    problem = make(kind, 16, classes, dtype)
    add_special_rows(problem)
    check_everything(problem)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_h(kernels, kind):
    for C in (24, 10):
        problem = make(kind, 4, C, torch.bfloat16, z_loss=0.01)
        problem.check("none")
        problem.check("mean")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("C", [16, 19])
def test_every_layout(kernels, layout, C):
    logits, axis = LAYOUTS[layout](3, C, torch.float32)
    Problem(logits, make_labels(logits, axis), *KINDS["sparse_background"](C), axis=axis).check("none")


@by_configuration
def test_the_bits_of_a_row_do_not_depend_on_the_batch(kernels, classes):
    problem = make("dense_negative", 9, classes, torch.bfloat16)

    def results(rows):
        x, labels = problem.logits[rows].unsqueeze(2), problem.labels[rows].unsqueeze(1)
        upstream = torch.ones(labels.shape)
        return ops.softmax_infogain(x, labels, *problem.H.parts, -100, 0.01, upstream, True, True)

    order = torch.randperm(9)
    whole, permuted = results(slice(None)), results(order)
    for i in (0, 4, 8):
        for a, b, c in zip(whole, permuted, results(slice(i, i + 1)), strict=True):
            assert torch.equal(a[order], b)
            assert torch.equal(a[i], c[0])


@by_configuration
def test_labels_out_of_range_give_nan_and_no_gradient(kernels, classes):
    problem = make("dense_negative", 6, classes)
    labels = problem.labels.clone()
    labels[[0, 3, 5]] = torch.tensor([-1, classes, 2**40])
    x = problem.logits.unsqueeze(2)
    arguments = (x, labels.unsqueeze(1), *problem.H.parts, -100, 0.01)
    # not by way of the op, which checks the labels of the CPU
    loss, lse, grad, norm = kernels.softmax_infogain(*arguments, torch.ones(6, 1), True, True)
    bad = torch.tensor([True, False, False, True, False, True])
    assert torch.equal(loss.isnan().flatten(), bad)
    assert (grad[bad] == 0).all() and (norm[bad] == 0).all()
    assert torch.allclose(lse, x.logsumexp(1))
    of_logits, of_loss, _ = kernels.softmax_infogain_double_backward(*arguments, torch.ones(6, 1), None, x)
    assert (of_logits[bad] == 0).all() and (of_loss[bad] == 0).all()


def test_labels_out_of_range_do_not_count_in_the_gradient_of_a_matrix(kernels):
    x, labels, ones = torch.randn(40, 37, 1), torch.randint(37, (40, 1)), torch.ones(40, 1)
    labels[::3] = torch.tensor([-1, 37, 2**40, -100]).repeat(4)[:14, None]
    counted = (labels.flatten() >= 0) & (labels.flatten() < 37)
    found = kernels.softmax_infogain_backward_matrix(x, labels, 37, -100, ones)
    expected = backends.reference.softmax_infogain_backward_matrix(x[counted], labels[counted], 37, -100, ones[counted])
    torch.testing.assert_close(found, expected)


@by_configuration
def test_a_gradient_made_in_advance_is_corrected_where_it_must_be(kernels, classes):
    problem = make("dense_negative", 12, classes)
    rows = (problem.logits.unsqueeze(2), problem.labels.unsqueeze(1), *problem.H.parts, -100, 0.0)
    upstream = torch.randn(12, 1)
    expected = upstream.clone()
    expected[[2, 7, 11]] = 1.0
    _, _, grad, _ = ops.softmax_infogain(*rows, expected, False, False)
    before = grad.clone()
    ops.softmax_infogain_backward_(grad, expected, *rows, expected, None)
    assert torch.equal(grad, before)
    ops.softmax_infogain_backward_(grad, expected, *rows, upstream, None)
    same = (expected == upstream).flatten()
    assert torch.equal(grad[same], before[same])
    problem.assert_grad(grad.squeeze(2), upstream.flatten(), "none")


@by_dtype
@by_some_kinds
def test_second_derivative(kernels, kind, dtype):
    test_softmax_infogain.test_second_derivative(kind, dtype, "none")


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("C", [200, 203])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@by_some_kinds
def test_second_derivative_with_several_warps(kernels, kind, dtype, C, columns):
    """Against the reference in float64: the rows of several warps, and those of a block of columns."""
    z_loss = 0.05
    problem = make(kind, 6, C, dtype, z_loss=z_loss, ignore_index=3)
    problem.labels[1] = 3
    x, labels = problem.logits.unsqueeze(2), problem.labels.unsqueeze(1)
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if columns else x
    upstream, of_lse, v = torch.randn(6, 1), torch.randn(6, 1), torch.randn(6, C, 1).to(dtype)
    parts = problem.H.parts if problem.H else [None] * 6

    def derivatives(answer, dtype):
        rows = (x.to(dtype), labels, *parts, 3, z_loss)
        return answer(*rows, upstream.to(dtype), of_lse.to(dtype), v.to(dtype))

    kernels.used.clear()
    found = ops.softmax_infogain_double_backward(x, labels, *parts, 3, z_loss, upstream, of_lse, v)
    assert kernels.used == {"columns" if columns else kernels.configure(C, x.element_size(), aligned=C % 8 == 0).mode}
    reference = backends.reference.softmax_infogain_double_backward
    largest = v.abs().max().item()
    slope = np.abs(array(problem.dense)).sum(1).max() + 2 * z_loss * (problem.exact.lse_scale + 1)
    factor = (np.abs(array(upstream)[:, 0]) * slope + np.abs(array(of_lse)[:, 0]))[:, None]
    scales = (factor * problem.exact.p_scale * largest, slope * largest, np.full(6, largest))
    results = zip(found, derivatives(reference, torch.float64), derivatives(reference, torch.float32), strict=True)
    for (got, exact, plain), scale in zip(results, scales, strict=True):
        scale = scale.reshape(exact.shape)
        assert_accurate(got, array(exact), plain.numpy(), scale, torch.float32, "second derivative")


@by_dtype
def test_gradient_of_a_matrix(kernels, dtype):
    for kind in ("dense_negative", "sparse_background", "diagonal_background"):
        test_softmax_infogain.test_gradient_of_the_tensors_of_H(kind, dtype, "mean")


def test_all_modes_are_tested():
    assert {configuration.mode for configuration, _ in CONFIGURATIONS.values()} == set(MODES)
