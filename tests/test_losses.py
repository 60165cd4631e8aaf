"""`SoftmaxInfogainLoss` and `softmax_infogain_loss` as a user of PyTorch meets them: beside nn.CrossEntropyLoss."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import KINDS, REDUCTIONS
from oracle import array
from tolerance import assert_accurate
from torch import nn

import lgd_kernels as lgd

pytestmark = pytest.mark.usefixtures("backend", "nan_prefill")
Infogain, Loss = lgd.Infogain, lgd.SoftmaxInfogainLoss
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPES = {"unbatched": (7,), "N_C": (6, 7), "N_C_d": (4, 7, 3), "N_C_d_d": (3, 7, 2, 3)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def labels_for(shape):
    return torch.randint(7, shape[:0] if len(shape) == 1 else (shape[0], *shape[2:]))


def assert_same_as_torch(ours: nn.Module, theirs: nn.Module, logits, target) -> None:
    """Loss and gradient of `ours` are those of `theirs`, which gets everything in float64 as the exact answer."""
    x, y = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    plain_x = logits.detach().requires_grad_()
    loss, exact = ours(x, target), theirs.double()(y, target.double() if target.is_floating_point() else target)
    plain = copy.deepcopy(theirs).to(logits.dtype)(plain_x, target)
    assert loss.dtype == logits.dtype
    upstream = torch.randn_like(loss)
    grads = [
        torch.autograd.grad(out, at, upstream.to(out.dtype))[0] for out, at in ((loss, x), (exact, y), (plain, plain_x))
    ]
    for got, expected, own in ((loss, exact, plain), (grads[0], grads[1], grads[2])):
        expected = array(expected)
        scale = max(1.0, float(abs(expected[abs(expected) < 1e300]).max(initial=0)))
        assert_accurate(got, expected, own.numpy(force=True), scale, logits.dtype)


@by_shape
@by_reduction
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_equals_cross_entropy(ignore_index, weighted, label_smoothing, reduction, shape):
    for dtype in (torch.float32, torch.float64):
        weight = torch.rand(7, dtype=dtype) * 3 if weighted else None
        options = {"label_smoothing": label_smoothing, "reduction": reduction, "ignore_index": ignore_index}
        labels = labels_for(shape)
        if len(shape) > 1:
            labels.view(-1)[1] = ignore_index
        ours, theirs = Loss(None, weight=weight, **options), nn.CrossEntropyLoss(weight, **options)
        assert_same_as_torch(ours, theirs, torch.randn(shape, dtype=dtype) * 3, labels)


@by_shape
@by_reduction
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_equals_cross_entropy_with_class_probabilities(weighted, label_smoothing, reduction, shape):
    for dtype in (torch.float32, torch.float64):
        weight = torch.rand(7, dtype=dtype) * 3 if weighted else None
        options = {"label_smoothing": label_smoothing, "reduction": reduction}
        target = torch.rand(shape, dtype=dtype) * 2  # also when it does not sum to 1
        ours, theirs = Loss(None, weight=weight, **options), nn.CrossEntropyLoss(weight, **options)
        assert_same_as_torch(ours, theirs, torch.randn(shape, dtype=dtype) * 3, target)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_gradient_of_class_probabilities_equals_that_of_cross_entropy(weighted, label_smoothing):
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    logits = torch.randn(4, 7, 3, dtype=torch.float64)
    grads = []
    for loss in (
        Loss(None, weight=weight, label_smoothing=label_smoothing),
        nn.CrossEntropyLoss(weight, label_smoothing=label_smoothing),
    ):
        torch.manual_seed(1)
        target = torch.rand(4, 7, 3, dtype=torch.float64).softmax(1).requires_grad_()
        grads += torch.autograd.grad(loss(logits, target), target)
    torch.testing.assert_close(*grads)


@by_reduction
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_all_labels_ignored_equals_cross_entropy(weighted, reduction):
    """The mean of nothing is NaN, and its gradient 0."""
    weight = torch.rand(7) if weighted else None
    for smoothing in (0.0, 0.2):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        ours, theirs = Loss(None, weight=weight, **options), nn.CrossEntropyLoss(weight, **options)
        x, y = torch.randn(4, 7).requires_grad_(), torch.randn(4, 7).requires_grad_()
        labels = torch.full((4,), -100)
        torch.testing.assert_close(ours(x, labels), theirs(y, labels), equal_nan=True)
        assert (torch.autograd.grad(ours(x, labels).sum(), x)[0] == 0).all()


@by_reduction
def test_weights_of_zero_equal_cross_entropy(reduction):
    """A class of weight 0; and all weights 0, where the mean is NaN."""
    for weight in (torch.tensor([1.0, 0.0, 2.0]), torch.zeros(3)):
        logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
        ours = Loss(None, weight=weight, reduction=reduction)(logits, labels)
        theirs = nn.CrossEntropyLoss(weight, reduction=reduction)(logits, labels)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_half_precision_is_as_good_as_float32_rounded_once(dtype, label_smoothing):
    logits, labels = (torch.randn(8, 100) * 3).to(dtype), torch.randint(100, (8,))
    options = {"weight": torch.rand(100), "label_smoothing": label_smoothing}
    x, y = logits.requires_grad_(), logits.detach().float().requires_grad_()
    loss, exact = Loss(None, **options)(x, labels), nn.CrossEntropyLoss(**options)(y, labels)
    loss.backward()
    exact.backward()
    assert loss.dtype == x.grad.dtype == dtype
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(loss.float(), exact, **rounding)
    torch.testing.assert_close(x.grad.float(), y.grad, **rounding)


def test_uint8_labels_equal_int64_labels():
    logits, labels = torch.randn(5, 7), torch.randint(7, (5,))
    for crit in (
        Loss(None, weight=torch.rand(7), label_smoothing=0.1),
        Loss(None),
        Loss(Infogain.label_smoothing(0.1, 7)),
    ):
        assert torch.equal(crit(logits, labels), crit(logits, labels.to(torch.uint8)))


def test_the_default_ignore_index_is_no_uint8_label():
    logits, labels = torch.randn(3, 200), torch.tensor([1, 156, 199])  # 156 is -100 in 8 bits
    weight = torch.rand(3) + 1
    losses = [
        lgd.softmax_infogain_loss(logits, some, sample_weight=weight, reduction="none")
        for some in (labels, labels.to(torch.uint8))
    ]
    assert torch.equal(*losses)
    assert losses[1][1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The module with an H
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_the_module_equals_the_function(kind):
    H, _ = KINDS[kind](7)
    options = {"reduction": "sum", "ignore_index": 3, "axis": 2, "z_loss": 0.01}
    logits, labels, weight = torch.randn(4, 5, 7), torch.randint(7, (4, 5)), torch.rand(4, 5)
    for w in (None, weight):
        ours = Loss(H, **options)(logits, labels, sample_weight=w)
        assert torch.equal(ours, lgd.softmax_infogain_loss(logits, labels, H, sample_weight=w, **options))


@pytest.mark.parametrize("normalization", ["full", "valid", "batch_size", "none"])
def test_the_module_takes_a_normalization(normalization):
    logits, labels = torch.randn(4, 7, 3), torch.randint(7, (4, 3))
    labels[0, :2] = -100
    by = {"full": 12, "valid": 10, "batch_size": 4, "none": 1}[normalization]
    weight = torch.rand(7)
    for crit, total in (
        (Loss(normalization=normalization), Loss(reduction="sum")),
        (Loss(weight=weight, normalization=normalization), Loss(weight=weight, reduction="sum")),
        (Loss(label_smoothing=0.1, normalization=normalization), Loss(label_smoothing=0.1, reduction="sum")),
        (Loss(Infogain.diagonal(weight), normalization=normalization), Loss(weight=weight, reduction="sum")),
    ):
        torch.testing.assert_close(crit(logits, labels), total(logits, labels) / by)


def test_the_module_takes_sample_weights():
    logits, labels, w = torch.randn(6, 7), torch.randint(7, (6,)), torch.rand(6)
    for options in ({}, {"weight": torch.rand(7)}, {"label_smoothing": 0.1}):
        each = nn.CrossEntropyLoss(reduction="none", **options)(logits, labels)
        torch.testing.assert_close(Loss(reduction="none", **options)(logits, labels, w), w * each)
        torch.testing.assert_close(Loss(reduction="sum", **options)(logits, labels, w), (w * each).sum())
    target = torch.rand(6, 7)
    each = nn.CrossEntropyLoss(reduction="none")(logits, target)
    torch.testing.assert_close(Loss(reduction="mean")(logits, target, w), (w * each).mean())


def test_class_weights_as_H_and_as_weight_differ_in_their_mean():
    """As the docstrings say: an H divides by the number of valid samples, `weight` by the sum of their weights."""
    logits, labels, weight = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, -100, 0]), torch.tensor([1.0, 2.0, 5.0])
    total = nn.CrossEntropyLoss(weight, reduction="sum")(logits, labels)
    torch.testing.assert_close(Loss(Infogain.diagonal(weight))(logits, labels), total / 5)
    torch.testing.assert_close(Loss(weight=weight)(logits, labels), total / (1 + 2 + 5 + 5 + 1))


def test_tensors_of_H_are_buffers_of_the_module():
    crit = Loss(Infogain.sparse(torch.eye(5), background=0.01))
    assert set(crit.state_dict()) == {"H_crow", "H_col", "H_values", "H_background"}
    assert list(crit.parameters()) == []
    assert crit.to("meta").H.parts.values.device.type == "meta"
    assert set(Loss(weight=torch.ones(3)).state_dict()) == {"weight"}
    assert Loss().state_dict() == {}


def test_a_state_dict_restores_H():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    crit, other = Loss(Infogain.dense(torch.rand(5, 5))), Loss(Infogain.dense(torch.rand(5, 5)))
    file = io.BytesIO()
    torch.save(crit.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(crit(logits, labels), other(logits, labels))
    assert torch.equal(copy.deepcopy(crit)(logits, labels), crit(logits, labels))


def test_a_parameter_as_H_is_trained():
    crit = Loss(Infogain.dense(nn.Parameter(torch.full((5, 5), 0.2))))
    assert [name for name, _ in crit.named_parameters()] == ["H_matrix"]
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    optimizer = torch.optim.SGD(crit.parameters(), lr=0.1)
    before = crit(logits, labels)
    before.backward()
    optimizer.step()
    assert crit(logits, labels) < before  # H is read anew in every call
    assert crit.H.parts.matrix is crit.H_matrix


def test_H_is_none_without_one():
    assert Loss().H is None
    assert Loss(weight=torch.ones(3)).H is None
    assert repr(Loss(Infogain.identity(4)).H) == repr(Infogain.identity(4))


def test_repr_says_what_it_does():
    text = repr(Loss(Infogain.label_smoothing(0.1, 7), reduction="sum", ignore_index=0))
    for part in ("SoftmaxInfogainLoss(", "label_smoothing", "num_classes=7", "reduction='sum'", "ignore_index=0"):
        assert part in text
    assert "label_smoothing=0.2" in repr(Loss(label_smoothing=0.2))
    assert "weight=(7,)" in repr(Loss(weight=torch.ones(7)))


def test_the_module_trains_a_network_like_cross_entropy():
    """Twenty steps of SGD end at the same weights."""
    x, labels = torch.randn(32, 8, dtype=torch.float64), torch.randint(5, (32,))
    weights = []
    for crit in (Loss(label_smoothing=0.05), nn.CrossEntropyLoss(label_smoothing=0.05)):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            crit(net(x), labels).backward()
            optimizer.step()
        weights.append(nn.utils.parameters_to_vector(net.parameters()))
    torch.testing.assert_close(*weights)


# ---------------------------------------------------------------------------------------------------------------------
# The function: axis
# ---------------------------------------------------------------------------------------------------------------------


def test_the_default_axis_of_unbatched_logits_is_their_only_one():
    logits, label = torch.randn(7), torch.tensor(3)
    expected = nn.functional.cross_entropy(logits, label)
    for axis in (1, 0, -1):
        torch.testing.assert_close(lgd.softmax_infogain_loss(logits, label, axis=axis), expected)
    each, p, lse, norm = lgd.softmax_infogain_loss(
        logits, label, reduction="none", return_probabilities=True, return_lse=True, return_grad_norm=True
    )
    assert p.shape == (7,)
    assert each.shape == lse.shape == norm.shape == ()


def test_every_axis_may_hold_the_classes():
    logits = torch.randn(4, 5, 6)
    for axis in (0, 1, 2, -1, -2, -3):
        labels = torch.randint(logits.shape[axis], logits.movedim(axis, 0).shape[1:])
        expected = nn.functional.cross_entropy(logits.movedim(axis, 1), labels)
        torch.testing.assert_close(lgd.softmax_infogain_loss(logits, labels, axis=axis), expected)


def test_batch_size_counts_the_axes_before_the_class_axis():
    logits = torch.randn(2, 3, 5, 4)
    total = lgd.softmax_infogain_loss(logits, torch.zeros(2, 3, 4, dtype=torch.int64), axis=2, reduction="sum")
    mean = lgd.softmax_infogain_loss(
        logits, torch.zeros(2, 3, 4, dtype=torch.int64), axis=2, normalization="batch_size"
    )
    torch.testing.assert_close(mean, total / 6)
