"""softmax_infogain, every backend, against the equations in extended precision (oracle.py)."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from cases import DTYPES, KINDS, LAYOUTS, NORMALIZATIONS, REDUCTIONS, SOME_KINDS, dtype_name, make_labels
from oracle import array
from problem import Problem
from tolerance import accumulation_dtype, assert_accurate

import lgd_kernels as lgd
from lgd_kernels import backends, ops
from lgd_kernels.infogain import InfogainParts

pytestmark = pytest.mark.usefixtures("backend", "nan_prefill")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
by_some_kinds = pytest.mark.parametrize("kind", SOME_KINDS)
INF = float("inf")


def make(kind: str, N: int, C: int, dtype: torch.dtype = torch.float32, **options) -> Problem:
    """A problem with logits (N, C)."""
    return Problem((torch.randn(N, C) * 3).to(dtype), torch.randint(C, (N,)), *KINDS[kind](C), **options)


def identity_problem(logits: torch.Tensor, labels: torch.Tensor) -> Problem:
    """The problem of (N, C) logits with H = identity, of which only the rows of the labels are made: C may be large."""
    rows = torch.zeros(logits.shape, dtype=torch.float64)
    rows[torch.arange(len(labels)), labels] = 1
    problem = Problem(logits, labels, None, rows)
    problem.exact = oracle.softmax_infogain(array(logits), np.arange(len(labels)), array(rows))
    problem.plain = oracle.plain_softmax_infogain(logits, torch.arange(len(labels)), rows)
    return problem


def sharpened(problem: Problem) -> Problem:
    """The same with the logit of each label raised, as in a trained net: some rows are sure, some are wrong."""
    problem.logits[torch.arange(len(problem.labels)), problem.labels] += torch.linspace(-5, 15, len(problem.labels)).to(
        problem.logits.dtype
    )
    return problem


@pytest.mark.cpu
def test_the_compiled_extension_has_every_op():
    wanted = [name for name in ops.names() if name.startswith("softmax_infogain")] + ["count_labels"]
    assert len(wanted) == 7
    if backends.extension is not None:
        assert [name for name in wanted if not backends.has_kernel(name, "cpu")] == []


# ---------------------------------------------------------------------------------------------------------------------
# Everything with everything
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind, dtype, reduction, layout):
    logits, axis = LAYOUTS[layout](5, 19, dtype)
    Problem(logits, make_labels(logits, axis), *KINDS[kind](19), axis=axis).check(reduction)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("layout", ["N_C", "N_C_d_d", "C_N_d"])
@by_some_kinds
def test_normalizations_with_weights_ignored_rows_and_z_loss(kind, layout, weighted, normalization):
    logits, axis = LAYOUTS[layout](9, 23, torch.float32)
    labels = make_labels(logits, axis)
    labels.view(-1)[::4] = -100
    weight = torch.randn(labels.shape) if weighted else None
    Problem(logits, labels, *KINDS[kind](23), axis=axis, sample_weight=weight, z_loss=0.01).check("mean", normalization)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
@by_some_kinds
def test_weights_ignored_rows_and_z_loss(kind, dtype, reduction):
    problem = make(kind, 18, 37, dtype, sample_weight=torch.rand(18).to(dtype) * 4, ignore_index=3, z_loss=1e-3)
    problem.labels[:3] = 3
    sharpened(problem).check(reduction)


@pytest.mark.parametrize("C", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 1000, 1027])
@by_dtype
@by_some_kinds
def test_class_counts_around_vector_widths(kind, dtype, C):
    sharpened(make(kind, 17, C, dtype)).check()


@pytest.mark.parametrize("d", [1, 2, 7, 8, 15, 16, 17, 33, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@by_some_kinds
def test_inner_sizes_around_vector_widths(kind, dtype, d):
    logits = (torch.randn(3, 10, d) * 3).to(dtype)
    Problem(logits, make_labels(logits, 1), *KINDS[kind](10)).check("sum")


@pytest.mark.parametrize("C", [1, 2, 3, 31, 63, 64, 65, 129, 2047, 2048, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@by_some_kinds
def test_class_counts_of_columns(kind, dtype, C):
    """Rows whose classes do not lie side by side."""
    logits = (torch.randn(2, C, 3) * 3).to(dtype)
    Problem(logits, make_labels(logits, 1), *KINDS[kind](C)).check()


@pytest.mark.parametrize("N", [1, 2, 5, 16, 17, 33])
@by_dtype
@by_some_kinds
def test_row_counts(kind, dtype, N):
    for C in (3, 40):
        make(kind, N, C, dtype).check()


@pytest.mark.parametrize(("shape", "axis"), [((5000, 10), 1), ((300, 500), 1), ((3, 10, 2001), 1), ((130, 900), 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@by_some_kinds
def test_enough_rows_for_many_threads(kind, dtype, shape, axis):
    logits = (torch.randn(shape) * 3).to(dtype)
    Problem(logits, make_labels(logits, axis), *KINDS[kind](shape[axis]), axis=axis).check()


@pytest.mark.parametrize("C", [32767, 32768, 32769, 65537, 100003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", ["none", "diagonal", "label_smoothing", "sparse"])
def test_long_rows(kind, dtype, C):
    logits = (torch.randn(3, C) * 3).to(dtype)
    labels = torch.tensor([0, C - 1, C // 2])
    logits[torch.arange(3), labels] += 9
    rows = torch.zeros(3, C, dtype=torch.float64)  # H[labels]: a dense H would not fit
    weight = torch.rand(C) * 3
    if kind == "none":
        H = None
        rows[torch.arange(3), labels] = 1
    elif kind == "diagonal":
        H = lgd.Infogain.diagonal(weight)
        rows[torch.arange(3), labels] = weight[labels].double()
    elif kind == "label_smoothing":
        H = lgd.Infogain.label_smoothing(0.1, C)
        rows[:] = 0.1 / C
        rows[torch.arange(3), labels] += 0.9
    else:
        stored = torch.stack([torch.arange(C), (torch.arange(C) * 7919) % C])
        H = lgd.Infogain.sparse(torch.sparse_coo_tensor(stored, weight, (C, C)), background=1e-5)
        rows[:] = 1e-5
        rows[torch.arange(3), stored[1, labels]] = weight[labels].double()
    problem = Problem(logits, labels, H, rows)
    options = {"z_loss": 0.0}
    problem.exact = oracle.softmax_infogain(array(logits), np.arange(3), array(rows), **options)
    problem.plain = oracle.plain_softmax_infogain(logits, torch.arange(3), rows, **options)
    problem.check("sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0), (0, 5, 0)])
def test_no_rows(shape, reduction):
    logits = torch.randn(shape, requires_grad=True)
    loss, p, lse, norm = lgd.softmax_infogain_loss(
        logits,
        make_labels(logits, 1),
        reduction=reduction,
        return_probabilities=True,
        return_lse=True,
        return_grad_norm=True,
    )
    expected = torch.nn.functional.cross_entropy(logits, make_labels(logits, 1), reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert p.shape == shape
    assert lse.shape == norm.shape == make_labels(logits, 1).shape
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad.shape == shape


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 3)])
def test_no_classes(shape):
    """Then every label is ignored, or wrong."""
    logits, labels = torch.empty(shape, requires_grad=True), torch.full((shape[0], *shape[2:]), -100)
    loss = lgd.softmax_infogain_loss(logits, labels, reduction="none")
    assert torch.equal(loss, torch.zeros(labels.shape))
    loss.sum().backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (4, 5, 0)])
def test_no_rows_leave_the_gradient_of_H_zero(shape):
    matrix = torch.rand(5, 5).requires_grad_()
    labels = torch.empty((shape[0], *shape[2:]), dtype=torch.int64)
    lgd.softmax_infogain_loss(torch.empty(shape), labels, lgd.Infogain.dense(matrix), reduction="sum").backward()
    assert torch.equal(matrix.grad, torch.zeros(5, 5))


@pytest.mark.parametrize("normalization", ["full", "valid", "batch_size", "none"])
def test_no_rows_with_a_normalization_is_zero(normalization):
    for shape in ((0, 5), (0, 5, 3), (4, 5, 0)):
        logits = torch.randn(shape, requires_grad=True)
        loss = lgd.softmax_infogain_loss(logits, make_labels(logits, 1), normalization=normalization)
        loss.backward()
        assert loss.item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Upstream gradients, retained graphs, accumulation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 32768.0, 65536.0, 0.0])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@by_dtype
@by_some_kinds
def test_upstream_gradient(kind, dtype, reduction, upstream):
    """Also for a tiny gradient, which float16 can hold only after it is scaled: no rounding before the scaling."""
    if dtype == torch.float16 and upstream > torch.finfo(dtype).max:
        pytest.skip("the upstream gradient has the dtype of the loss")
    problem = sharpened(make(kind, 6, 300, dtype, sample_weight=torch.full((6,), 2.0**-16)))
    logits = problem.logits.detach().requires_grad_()
    loss = problem.loss(logits, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.to(problem.accumulated) * upstream, logits)
    problem.assert_grad(grad, upstream, reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_retained_graph_gives_the_same_gradient_every_time(reduction, weighted):
    problem = make("dense_negative", 7, 33, sample_weight=torch.rand(7) if weighted else None)
    logits = problem.logits.detach().requires_grad_()
    loss = problem.loss(logits, reduction=reduction)
    for upstream, retain in ((1.0, True), (0.25, True), (1.0, True), (65536.0, True), (1.0, True), (0.5, False)):
        (grad,) = torch.autograd.grad(loss, logits, torch.tensor(upstream), retain_graph=retain)
        problem.assert_grad(grad, upstream, reduction)
        grad.fill_(torch.nan)  # whoever gets a gradient may write into it


@pytest.mark.parametrize("layout", ["N_C", "N_C_d", "C_N_d"])
@pytest.mark.parametrize("C", [9, 100])
@by_dtype
@by_some_kinds
def test_a_gradient_made_in_advance_is_corrected_where_it_must_be(kind, dtype, layout, C):
    """Rows for which the upstream gradient is the expected one keep theirs, also among others that do not."""
    logits, axis = LAYOUTS[layout](37, C, dtype)
    x = logits.movedim(axis, 1).reshape(37, C, -1)
    problem = Problem(x, make_labels(x, 1), *KINDS[kind](C))
    upstream = torch.randn(problem.labels.shape, dtype=problem.accumulated)
    expected = torch.where(torch.rand(upstream.shape) < 0.9, upstream, 1.0)
    expected[:16] = upstream[:16]
    rows = (x, problem.labels, *(problem.H.parts if problem.H else [None] * 6), -100, 0.0)
    _, _, grad, _ = ops.softmax_infogain(*rows, expected, False, False)
    before = grad.clone()
    ops.softmax_infogain_backward_(grad, expected, *rows, upstream, None)
    same = (expected == upstream).unsqueeze(1).expand_as(grad)
    assert torch.equal(grad[same], before[same])
    problem.assert_grad(grad, upstream, "none")


def test_accumulating_from_a_retained_graph():
    problem = make("dense_negative", 7, 33)
    for retain in (True, False):  # whether the last pass retains it
        logits = problem.logits.detach().requires_grad_()
        loss = problem.loss(logits)
        for keep in (True, True, retain):
            loss.backward(retain_graph=keep)
        problem.assert_grad(logits.grad, 3.0)


def test_a_second_backward_through_a_freed_graph_raises():
    logits = torch.randn(4, 6, requires_grad=True)
    loss = lgd.softmax_infogain_loss(logits, torch.arange(4))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@by_dtype
def test_the_gradient_is_made_in_the_forward_pass(dtype, weighted, reduction):
    """The one moment at which the row is in cache anyway: logits that change later do not change it."""
    problem = make("diagonal_background", 5, 21, dtype, sample_weight=torch.rand(5) if weighted else None)
    logits = problem.logits.clone().requires_grad_()
    loss = problem.loss(logits, reduction=reduction)
    logits.data.fill_(torch.nan)
    loss.backward()
    problem.assert_grad(logits.grad, 1.0, reduction)


def test_the_same_logits_used_twice():
    problem = make("dense_negative", 7, 33)
    logits = problem.logits.detach().requires_grad_()
    (problem.loss(logits) + 2 * problem.loss(logits)).backward()
    problem.assert_grad(logits.grad, 3.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
def test_the_gradient_of_contiguous_memory_keeps_the_layout(dtype, reduction):
    for layout in ("N_C", "N_C_d", "transposed", "channels_last", "C_N_d"):
        logits, axis = LAYOUTS[layout](4, 9, dtype)
        logits.requires_grad_()
        loss = lgd.softmax_infogain_loss(logits, make_labels(logits, axis), axis=axis, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad.stride() == logits.stride()


def test_labels_and_weights_of_any_strides():
    logits = torch.randn(6, 11, 4)
    labels = torch.randint(11, (4, 6)).T
    weight = torch.rand(6, 1).expand(6, 4)
    Problem(logits, labels, *KINDS["dense_negative"](11), sample_weight=weight).check()
    Problem(logits, labels[:1].expand(6, 4), *KINDS["none"](11)).check("none")
    Problem(logits.select(2, 1), torch.randint(11, (6, 3))[:, 1], *KINDS["sparse"](11)).check("sum")


def test_nothing_is_differentiated_when_nothing_needs_it():
    logits, labels = torch.randn(4, 6), torch.arange(4)
    assert not lgd.softmax_infogain_loss(logits, labels).requires_grad
    with torch.no_grad():
        assert not lgd.softmax_infogain_loss(logits.requires_grad_(), labels).requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inputs_are_not_modified(reduction):
    problem = make("dense_negative", 7, 33, sample_weight=torch.rand(7, requires_grad=True), z_loss=0.1)
    tensors = (problem.logits.requires_grad_(), problem.labels, problem.sample_weight, problem.H.parts.matrix)
    before = [(t.detach().clone(), t._version) for t in tensors]
    for create_graph in (False, True):
        loss = problem.loss(reduction=reduction).sum() * 0.5
        (grad,) = torch.autograd.grad(loss, problem.logits, create_graph=create_graph)
    grad.square().sum().backward()
    for tensor, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version


# ---------------------------------------------------------------------------------------------------------------------
# The other inputs that have a gradient, and the other outputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
@by_some_kinds
def test_gradient_of_sample_weight(kind, dtype, reduction):
    """d loss / d w_i is the row's loss without its weight, times its upstream gradient; 0 for an ignored row."""
    problem = make(kind, 6, 21, dtype, sample_weight=torch.rand(6), z_loss=0.01, ignore_index=2)
    problem.labels[4] = 2
    weight = problem.sample_weight.requires_grad_()
    loss = problem.loss(reduction=reduction)
    upstream = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, weight, upstream)
    up = problem.upstream_of_rows(upstream if reduction == "none" else upstream.item(), reduction)
    one = Problem(problem.logits, problem.labels, None, problem.dense, ignore_index=2, z_loss=0.01)
    plain = up.astype(one.plain.loss.dtype) * one.plain.loss
    assert_accurate(grad, up * one.exact.loss, plain, np.abs(up) * one.exact.loss_scale, problem.accumulated)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("none", "identity")])
def test_gradient_of_the_tensors_of_H(kind, dtype, reduction):
    """dH[l, j] = -sum of w log p_j over the rows with label l, added up over the entries that a stored tensor fills."""
    C = 13
    problem = make(kind, 29, C, dtype, sample_weight=torch.rand(29), z_loss=0.01, ignore_index=2)
    problem.labels[3] = 2
    parts = problem.H.parts._asdict()
    names = [name for name in ("matrix", "background", "diagonal", "values") if parts[name] is not None]
    upstream = torch.randn(problem.labels.shape if reduction == "none" else ()).to(dtype)

    def gradients(*names):
        """Of a problem in which these parts of H, and only these, are trained."""
        trained = {name: parts[name].detach().clone().requires_grad_() for name in names}
        problem.H = lgd.Infogain(kind, C, InfogainParts(**{**parts, **trained}))
        return torch.autograd.grad(problem.loss(reduction=reduction), list(trained.values()), upstream)

    up = problem.upstream_of_rows(upstream if reduction == "none" else upstream.item(), reduction)
    exact, plain, scale = np.zeros((C, C), np.longdouble), np.zeros((C, C), problem.plain.p.dtype), 0 * np.eye(C)
    labels = np.where(problem.exact.kept, array(problem.labels), 0)
    factor = -up * problem.exact.weight
    np.add.at(exact, labels, factor[:, None] * problem.exact.log_p)
    np.add.at(scale, labels, np.abs(factor[:, None]) * (np.abs(problem.exact.log_p) + problem.exact.lse_scale[:, None]))
    np.add.at(plain, labels, factor.astype(plain.dtype)[:, None] * problem.plain.log_p)

    stored = np.zeros((C, C), bool)
    if parts["values"] is not None:
        stored[np.repeat(np.arange(C), array(parts["crow"].diff())), array(parts["col"])] = True
    diagonal_sums = parts["diagonal"] is not None and parts["diagonal"].dim() == 0
    pick = {
        "matrix": lambda dense: np.where(stored, 0, dense),
        "background": lambda dense: np.asarray(dense[~stored].sum()),
        "diagonal": lambda dense: np.asarray(np.trace(dense)) if diagonal_sums else np.diagonal(dense),
        "values": lambda dense: dense[stored],
    }
    for name, together in zip(names, gradients(*names), strict=True):
        for grad in (together, *gradients(name)):
            assert grad.dtype == parts[name].dtype
            expected = (pick[name](dense) for dense in (exact, plain, scale))
            assert_accurate(grad, *expected, problem.accumulated, name)


@pytest.mark.parametrize("layout", ["N_C", "N_C_d", "C_N_d", "unbatched"])
@by_dtype
@by_some_kinds
def test_optional_outputs(kind, dtype, layout):
    logits, axis = LAYOUTS[layout](5, 19, dtype)
    labels = make_labels(logits, axis)
    weight = torch.randn(labels.shape)
    problem = Problem(logits, labels, *KINDS[kind](19), axis=axis, sample_weight=weight, z_loss=0.05)
    problem.ignore_index = int(labels.reshape(-1)[-1])
    loss, p, lse, norm = problem.loss(
        reduction="none", return_probabilities=True, return_lse=True, return_grad_norm=True
    )
    problem.assert_loss(loss, "none")
    problem.assert_rows(p, problem.exact.p, problem.plain.p, problem.exact.p_scale, "probabilities")
    problem.assert_per_row(lse, "lse")
    problem.assert_per_row(norm, "norm")
    assert (loss.dtype, p.dtype) == (dtype, dtype)
    assert lse.dtype == norm.dtype == accumulation_dtype(dtype)


def test_optional_outputs_come_in_a_fixed_order():
    logits, labels = torch.randn(3, 5), torch.arange(3)
    names = ("return_probabilities", "return_lse", "return_grad_norm")
    loss, *everything = lgd.softmax_infogain_loss(logits, labels, **dict.fromkeys(names, True))
    for i, name in enumerate(names):
        first, second = lgd.softmax_infogain_loss(logits, labels, **{name: True})
        assert torch.equal(first, loss)
        assert torch.equal(second, everything[i])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
@by_some_kinds
def test_gradient_through_the_lse(kind, dtype, reduction):
    """Together with the loss and alone; ignored rows have an lse too."""
    problem = make(kind, 7, 21, dtype, sample_weight=torch.rand(7), ignore_index=2, z_loss=0.01)
    problem.labels[4] = 2
    for factor in (1.0, 0.0):
        logits = problem.logits.detach().requires_grad_()
        loss, lse = problem.loss(logits, reduction=reduction, return_lse=True)
        upstream = torch.full_like(loss, factor)
        upstream_of_lse = torch.randn_like(lse)
        outputs, upstreams = ([loss, lse], [upstream, upstream_of_lse]) if factor else ([lse], [upstream_of_lse])
        (grad,) = torch.autograd.grad(outputs, logits, upstreams)
        up = upstream if reduction == "none" else factor
        problem.assert_grad(grad, up, reduction, upstream_of_lse=upstream_of_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_gradient_through_the_probabilities(dtype):
    problem = make("none", 6, 11, dtype)
    logits = problem.logits.detach().requires_grad_()
    _, p = problem.loss(logits, return_probabilities=True)
    v = torch.randn(6, 11).to(dtype)
    (grad,) = torch.autograd.grad(p, logits, v)

    def jacobian_product(p, v):
        return p * (v - (p * v).sum(1, keepdims=True))

    plain = jacobian_product(problem.plain.p, v.to(problem.accumulated).numpy(force=True))
    exact, scale = jacobian_product(problem.exact.p, array(v)), problem.exact.p_scale * np.abs(array(v)).max()
    problem.assert_rows(grad, exact, plain, scale + np.finfo(np.float32).tiny, "gradient")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_dtype
@by_some_kinds
def test_second_derivative(kind, dtype, reduction):
    """The Hessian of one row times v: w (s p (v - <p, v>)) and, for z_loss c, 2 c w p (lse (v - <p, v>) + <p, v>)."""
    c = 0.05
    problem = make(kind, 9, 21, dtype, sample_weight=torch.rand(9), ignore_index=2, z_loss=c)
    problem.labels[4] = 2
    logits = problem.logits.detach().requires_grad_()
    loss = problem.loss(logits, reduction=reduction)
    upstream = torch.randn_like(loss).requires_grad_()
    (grad,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
    problem.assert_grad(grad, upstream.detach() if reduction == "none" else upstream.item(), reduction)
    v = torch.randn(9, 21).to(dtype)
    product, of_upstream = torch.autograd.grad(grad, (logits, upstream), v)

    up = problem.upstream_of_rows(upstream if reduction == "none" else upstream.item(), reduction)

    def hessian_product(rows, up, v):
        mean = (rows.p * v).sum(1, keepdims=True)
        return (up * rows.weight)[:, None] * rows.p * (rows.slope[:, None] * (v - mean) + 2 * c * mean)

    scale = np.abs(up * problem.exact.weight)[:, None] * problem.exact.p_scale * np.abs(array(v)).max()
    scale = scale * (np.abs(array(problem.dense)).sum(1).max() + 2 * c * (problem.exact.lse_scale[:, None] + 1))
    plain = hessian_product(
        problem.plain, up.astype(problem.plain.p.dtype), v.to(problem.accumulated).numpy(force=True)
    )
    problem.assert_rows(product, hessian_product(problem.exact, up, array(v)), plain, scale, "Hessian product")

    by_row = (problem.exact.grad * array(v)).sum(1)
    plain_by_row = (problem.plain.grad * v.to(problem.accumulated).numpy(force=True)).sum(1)
    scale = (problem.exact.grad_scale * np.abs(array(v))).sum(1)
    if reduction == "mean":
        by_row, plain_by_row, scale = (rows / problem.denominator(None) for rows in (by_row, plain_by_row, scale))
    if reduction != "none":
        by_row, plain_by_row, scale = by_row.sum(), np.asarray(plain_by_row.sum()), scale.sum()
    assert_accurate(of_upstream, by_row, plain_by_row, scale, problem.accumulated, "gradient of the upstream gradient")


# ---------------------------------------------------------------------------------------------------------------------
# Ignored rows, labels of both dtypes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
@by_dtype
@by_some_kinds
def test_ignored_rows_are_zero_whatever_is_in_them(kind, dtype, bad):
    problem = make(kind, 6, 17, dtype, z_loss=0.1)
    problem.labels[[0, 3]] = -100
    problem.logits[0] = bad
    logits = problem.logits.requires_grad_()
    loss, norm = problem.loss(reduction="none", return_grad_norm=True)
    (grad,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    assert loss[0] == norm[0] == 0
    assert (grad[0] == 0).all()
    for reduction in REDUCTIONS:
        problem.check(reduction)
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss), create_graph=True)
    (product,) = torch.autograd.grad(grad, logits, torch.ones_like(grad))
    assert (product[[0, 3]] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_ignored_row_may_have_any_weight(reduction):
    problem = make("dense_negative", 6, 17, sample_weight=torch.rand(6))
    problem.labels[[1, 4]] = -100
    expected = problem.loss(reduction=reduction)
    problem.sample_weight[[1, 4]] = torch.tensor([torch.nan, INF])
    weight = problem.sample_weight.requires_grad_()
    loss, norm = problem.loss(reduction=reduction, return_grad_norm=True)
    assert torch.equal(loss, expected)
    assert (norm[[1, 4]] == 0).all()
    (grad,) = torch.autograd.grad(loss.sum(), weight)
    assert (grad[[1, 4]] == 0).all()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("options", [{"reduction": "sum"}, {}, {"normalization": "full"}], ids=["sum", "mean", "full"])
@by_some_kinds
def test_asking_for_more_outputs_changes_no_bit(kind, options, weighted):
    """The loss alone comes from an op that reduces; with another output it is reduced by PyTorch. An upstream gradient
    other than 1 is rounded once more there."""
    problem = make(kind, 9, 37)
    problem.labels[::4] = -100
    weight = torch.rand(9) if weighted else None
    results = []
    for more in ({}, {"return_lse": True}):
        for scale in (1.0, 0.3):
            x = problem.logits.clone().requires_grad_()
            loss = lgd.softmax_infogain_loss(x, problem.labels, problem.H, sample_weight=weight, **options, **more)
            loss = loss[0] if more else loss
            (grad,) = torch.autograd.grad(scale * loss, x)
            results.append((loss.detach(), grad))
    (loss, grad), (loss_again, scaled_grad), (general_loss, general_grad), (_, general_scaled_grad) = results
    assert torch.equal(loss, general_loss)
    assert torch.equal(loss, loss_again)
    assert torch.equal(grad, general_grad)
    torch.testing.assert_close(scaled_grad, general_scaled_grad, rtol=1e-6, atol=1e-8)


def test_count_labels():
    labels = torch.randint(3, (7, 50))
    for view in (
        labels,
        torch.randint(3, (70_001,)),
        labels.T,
        labels[::2, 3::5],
        labels[:0],
        labels[:1].expand(9, 50),
    ):
        count = ops.count_labels(view, 2, torch.float32)
        assert count.dtype == torch.float32
        assert count.item() == sum(label != 2 for label in view.flatten().tolist())


@by_some_kinds
def test_all_rows_ignored(kind):
    problem = make(kind, 4, 9)
    problem.labels[:] = -100
    logits = problem.logits.requires_grad_()
    assert problem.loss(reduction="sum").item() == 0
    assert (problem.loss(reduction="none") == 0).all()
    for normalization in NORMALIZATIONS:
        loss = problem.loss(normalization=normalization)
        assert loss.isnan() if normalization is None else loss == 0
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad == 0).all()


def test_ignore_index_within_the_classes():
    problem = make("dense_negative", 12, 4, ignore_index=1)
    assert (problem.labels == 1).any()
    problem.check()
    problem.check("none")


def test_uint8_labels_with_ignore_index_255():
    C = 200
    logits = torch.randn(8, C)
    labels = torch.tensor([0, 255, 127, 128, 199, 255, 3, 130], dtype=torch.uint8)
    for reduction in REDUCTIONS:
        Problem(logits, labels, *KINDS["dense_negative"](C), ignore_index=255).check(reduction)


# ---------------------------------------------------------------------------------------------------------------------
# Adversarial rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1e4, -1e4])
@by_dtype
@by_some_kinds
def test_a_large_offset_of_the_logits(kind, dtype, offset):
    problem = make(kind, 9, 35, dtype)
    problem.logits += offset
    for reduction in REDUCTIONS:
        problem.check(reduction)


@by_dtype
@by_some_kinds
def test_logits_far_apart(kind, dtype):
    problem = make(kind, 9, 35, dtype)
    problem.logits *= 1000 if dtype != torch.float16 else 300
    problem.check("none")
    problem.check("sum")


@by_dtype
@by_some_kinds
def test_equal_logits(kind, dtype):
    for value in (0.0, 5.0, -3e4):
        problem = make(kind, 4, 33, dtype)
        problem.logits.fill_(value)
        problem.check("none")


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("C", [16, 33, 64, 100, 1000, 2000, 5000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_small_terms_beside_a_large_one(dtype, C, columns):
    """Equal small terms added one by one to a large one are all rounded alike: the errors add up."""
    below = torch.linspace(-13, -3, 16, dtype=dtype) if dtype == torch.float32 else torch.linspace(-33, -3, 16).double()
    logits = below[:, None].repeat(1, C)
    labels = torch.arange(16) % C
    logits[torch.arange(16), labels] = 0
    if columns:
        logits = logits.T.contiguous().T
    problem = identity_problem(logits, labels)
    problem.check("sum")


@pytest.mark.parametrize("C", [2, 16, 33, 1000])
@by_some_kinds
def test_float16_at_its_limits(kind, C):
    problem = make(kind, 6, C, torch.float16)
    problem.logits[:, ::2] = 65504
    problem.logits[:, 1::2] = -65504
    problem.logits[0], problem.logits[1], problem.logits[2] = 65504, -65504, 6e-8
    problem.check("none")
    problem.logits = problem.logits[:3]
    problem.labels = problem.labels[:3]
    del problem.exact, problem.plain
    problem.check("mean")


def add_special_rows(problem: Problem) -> None:
    """Masks of -inf, rows of only -inf, NaN and +inf, in the first, a middle and the last class, in rows 0 to 14."""
    logits, C = problem.logits, problem.logits.shape[1]
    for i, special in enumerate((-INF, INF, torch.nan)):
        for k, position in enumerate((0, C // 2, C - 1)):
            logits[3 * i + k, position] = special
    logits[9] = -INF
    logits[10, : C - 1] = -INF
    logits[11, 1:] = -INF
    logits[12, C // 2], logits[12, 0] = torch.nan, INF
    logits[13, torch.rand(C) < 0.5] = -INF
    logits[14, problem.labels[14]] = -INF


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("C", [1, 2, 9, 16, 17, 40, 1027])
@by_dtype
@by_some_kinds
def test_special_rows(kind, dtype, C, columns):
    problem = make(kind, 24, C, dtype)
    if columns:
        problem.logits = problem.logits.T.contiguous().T
    add_special_rows(problem)
    problem.check("none")
    problem = Problem(problem.logits[13:], problem.labels[13:], problem.H, problem.dense)
    problem.logits[torch.as_tensor(np.isnan(problem.exact.loss))] = 0
    Problem(problem.logits, problem.labels, problem.H, problem.dense).check("mean")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_special_long_rows(dtype, columns):
    """Whole stretches of -inf, and NaN and +inf at either end of rows that are summed in pieces."""
    C = 100_003
    logits = (torch.randn(10, C) * 3).to(dtype)
    logits[0, :70_000] = logits[1, 30_000:] = logits[2, 32_768:65_536] = -INF
    logits[3] = -INF
    logits[4, : C - 1] = -INF
    logits[5, 0] = logits[6, C - 1] = torch.nan
    logits[7, 0] = logits[8, C - 1] = INF
    labels = torch.tensor([80_000, 100, 0, 5, C - 1, 0, 0, 0, 0, 40_000])
    if columns:
        logits = logits.T.contiguous().T
    problem = identity_problem(logits, labels)
    assert np.isnan(problem.exact.loss.astype(float)).tolist() == [False] * 3 + [True] + [False] + [True] * 4 + [False]
    problem.check("none")


@pytest.mark.parametrize("masked", [0, 5, 15, 16, 18])
@by_dtype
def test_a_masked_class_contributes_by_the_sign_of_H(dtype, masked):
    """At a logit of -inf: H > 0 gives +inf, H < 0 gives -inf, H == 0 gives nothing. The gradient is -H there."""
    C = 19
    logits = torch.randn(3, C).to(dtype)
    logits[:, masked] = -INF
    matrix = torch.rand(C, C) + 0.5
    matrix[:3, masked] = torch.tensor([2.0, -2.0, 0.0])
    labels = torch.arange(3)
    kept = torch.arange(C) != masked
    dense = lgd.Infogain.dense(matrix)
    rows, cols = torch.ones(C, C).nonzero(as_tuple=True)
    sparse = lgd.Infogain.sparse(torch.sparse_coo_tensor(torch.stack([rows, cols]), matrix.flatten(), (C, C)))
    for H in (dense, sparse):
        x = logits.clone().requires_grad_()
        loss = lgd.softmax_infogain_loss(x, labels, H, reduction="none")
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert loss[0] == INF
        assert loss[1] == -INF
        alone = Problem(logits[:, kept], labels, None, matrix.double()[:, kept])
        assert_accurate(
            loss[2:], alone.exact.loss[2:], alone.plain.loss[2:], alone.exact.loss_scale[2:], alone.accumulated
        )
        assert grad[:, masked].tolist() == [-2.0, 2.0, 0.0]
        assert grad.isfinite().all()


def test_a_masked_class_and_a_background():
    C = 20
    logits = torch.randn(2, C)
    logits[:, 7] = -INF
    stored = torch.zeros(C, C)
    stored[1, 7] = 1.0
    for background, expected in ((0.5, INF), (-0.5, -INF)):
        labels = torch.tensor([0, 0])
        for H in (
            lgd.Infogain.diagonal(torch.ones(C), background=background),
            lgd.Infogain.sparse(stored.to_sparse(), background=background),
        ):
            loss = lgd.softmax_infogain_loss(logits, labels, H, reduction="none")
            assert loss.tolist() == [expected] * 2
    zero_stored = torch.sparse_coo_tensor([[0], [7]], [0.0], (C, C))  # a stored 0 takes the background's place
    H = lgd.Infogain.sparse(zero_stored, background=0.5)
    assert lgd.softmax_infogain_loss(logits[:1], labels[:1], H).isfinite()
    cancelled = lgd.Infogain.diagonal(torch.full((C,), -0.5), background=0.5)  # as a diagonal may
    logits, kept = logits[:1], torch.arange(C) != 7
    alone = Problem(logits[:, kept], torch.tensor([0]), None, torch.full((C - 1, C - 1), 0.5))
    alone.assert_loss(lgd.softmax_infogain_loss(logits, torch.tensor([7]), cancelled))


# ---------------------------------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------------------------------


def loss_and_grad(logits, labels, H, reduction="sum"):
    logits = logits.detach().requires_grad_()
    loss, lse, norm = lgd.softmax_infogain_loss(
        logits, labels, H, reduction="none", z_loss=0.01, return_lse=True, return_grad_norm=True
    )
    total = lgd.softmax_infogain_loss(logits, labels, H, reduction=reduction, z_loss=0.01)
    (advance,) = torch.autograd.grad(total, logits)
    (later,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    return loss.detach(), lse.detach(), norm, advance, later


@pytest.mark.parametrize("kind", SOME_KINDS)
@by_dtype
@pytest.mark.parametrize(("N", "C"), [(37, 3), (37, 10), (21, 67), (9, 1000)])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(compiled, kind, dtype, N, C):
    problem = make(kind, N, C, dtype)
    whole = loss_and_grad(problem.logits, problem.labels, problem.H)
    order = torch.randperm(N)
    permuted = loss_and_grad(problem.logits[order], problem.labels[order], problem.H)
    for i in (0, 1, N // 2, N - 1):
        alone = loss_and_grad(problem.logits[i : i + 1], problem.labels[i : i + 1], problem.H)
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0], b[i])
    for a, b in zip(permuted, whole, strict=True):
        assert torch.equal(a, b[order])


@pytest.mark.parametrize("kind", SOME_KINDS)
@by_dtype
@pytest.mark.parametrize("C", [7, 100, 2500])
def test_the_bits_of_a_column_do_not_depend_on_the_batch(compiled, kind, dtype, C):
    logits = (torch.randn(2, C, 19) * 3).to(dtype)
    labels, (H, _) = make_labels(logits, 1), KINDS[kind](C)
    whole = loss_and_grad(logits, labels, H)
    for n, i in ((0, 0), (1, 7), (1, 18)):
        alone = loss_and_grad(logits[n : n + 1, :, i : i + 1], labels[n : n + 1, i : i + 1], H)
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0, ..., 0], b[n, ..., i])


@pytest.mark.cpu
@by_dtype
def test_the_bits_of_a_long_row_depend_neither_on_the_batch_nor_on_the_threads(compiled, threads, dtype):
    C = 200_000
    logits = (torch.randn(5, C) * 3).to(dtype)
    labels = torch.tensor([7, 0, C - 1, 99_999, 5])
    for H in (None, lgd.Infogain.label_smoothing(0.1, C)):
        results = []
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(loss_and_grad(logits, labels, H))
            results.append(loss_and_grad(logits, labels, H))
            alone = [loss_and_grad(logits[i : i + 1], labels[i : i + 1], H) for i in range(5)]
            results.append([torch.cat(rows) for rows in zip(*alone, strict=True)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.cpu
def test_the_bits_of_short_rows_do_not_depend_on_the_threads(compiled, threads):
    problem = make("dense_negative", 3000, 33)
    results = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(loss_and_grad(problem.logits, problem.labels, problem.H))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.cpu
@by_dtype
def test_the_gradient_of_H_does_not_depend_on_the_threads(compiled, threads, dtype):
    problem = make("dense_negative", 3000, 33, dtype)
    matrix = problem.H.parts.matrix.requires_grad_()
    results = []
    for number in (1, 2, 2, 5):
        torch.set_num_threads(number)
        results.append(torch.autograd.grad(problem.loss(), matrix)[0])
    for other in results[1:]:
        assert torch.equal(results[0], other)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def large_allocations(run, at_least: int) -> list[int]:
    """The sizes in bytes of the blocks of at least that size that `run` allocates."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [size for size in events if size >= at_least]


@pytest.mark.cpu
@pytest.mark.parametrize(
    "kind", ["none", "diagonal_background", "label_smoothing", "sparse_background", "dense_float32"]
)
@by_dtype
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_loss_and_gradient_allocate_one_gradient(compiled, kind, dtype, upstream):
    N, C = 600, 100
    problem = make(kind, N, C, dtype)
    for reduction in ("mean", "sum"):
        for view in (lambda x: x, lambda x: x.T.contiguous().T, lambda x: x.unflatten(0, (6, 100)).transpose(1, 2)):
            logits = view(problem.logits).detach().requires_grad_()
            labels = problem.labels if logits.dim() == 2 else problem.labels.unflatten(0, (6, 100))

            def step(logits=logits, labels=labels, reduction=reduction):
                loss = lgd.softmax_infogain_loss(logits, labels, problem.H, reduction=reduction)
                (loss if upstream == 1 else loss * upstream).backward()

            size = problem.logits.nbytes
            assert large_allocations(step, size // 2) == [size]


@pytest.mark.cpu
def test_the_loss_alone_allocates_nothing_of_the_size_of_the_logits(compiled):
    problem = make("dense_float32", 600, 100)
    for reduction in REDUCTIONS:
        assert large_allocations(lambda r=reduction: problem.loss(reduction=r), problem.logits.nbytes // 2) == []


@pytest.mark.cpu
def test_a_retained_graph_allocates_one_gradient_for_each_pass(compiled):
    problem = make("dense_float32", 600, 100)
    logits = problem.logits.requires_grad_()
    loss = problem.loss()
    size = logits.nbytes
    assert large_allocations(lambda: torch.autograd.grad(loss, logits, retain_graph=True), size // 2) == [size]


def test_more_rows_of_h_than_float32_can_count():
    """Class probabilities give every row of the logits a row of H of its own."""
    n_rows = 2**24 + 5
    matrix = torch.zeros(n_rows, 2, dtype=torch.float16)
    labels = torch.tensor([[2**24 - 1], [2**24 + 1], [n_rows - 2], [n_rows - 1]])
    matrix[labels.flatten(), 0] = torch.arange(1.0, 5.0, dtype=torch.float16)
    logits = torch.randn(4, 2, 1)
    loss, *_ = ops.softmax_infogain(logits, labels, *InfogainParts(matrix=matrix), -100, 0.0, None, False, False)
    expected = -torch.arange(1.0, 5.0) * logits.squeeze(2).log_softmax(1)[:, 0]
    torch.testing.assert_close(loss.squeeze(1), expected)
