"""Bad input raises before any work is done, with the argument's name and both values in the message."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from device import DEVICE

import lgd_kernels as lgd
from lgd_kernels import backends, ops
from lgd_kernels.infogain import InfogainParts

Infogain, Loss = lgd.Infogain, lgd.SoftmaxInfogainLoss
LOGITS, LABELS = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
NAN, INF = float("nan"), float("inf")

# what is wrong: (the arguments, the error, its message)
LOSS_CASES = {
    "logits not a tensor": ({"logits": [1.0]}, TypeError, "logits: expected a torch.Tensor, got list"),
    "logits of integers": (
        {"logits": torch.ones(4, 5, dtype=torch.int64)},
        TypeError,
        "logits: dtype must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
    "logits complex": (
        {"logits": torch.ones(4, 5, dtype=torch.complex64)},
        TypeError,
        "logits: dtype must be float64, float32, bfloat16 or float16, got torch.complex64",
    ),
    "logits a scalar": (
        {"logits": torch.tensor(1.0), "labels": torch.tensor(0)},
        ValueError,
        "logits: expected at least 1 dimension, got a scalar of shape ()",
    ),
    "axis too large": ({"axis": 2}, ValueError, "axis: 2 is out of range for logits of shape (4, 5)"),
    "axis too small": ({"axis": -3}, ValueError, "axis: -3 is out of range for logits of shape (4, 5)"),
    "axis of unbatched logits": (
        {"logits": torch.ones(5), "labels": torch.tensor(0), "axis": 2},
        ValueError,
        "axis: 2 is out of range for logits of shape (5,)",
    ),
    "logits sparse": (
        {"logits": LOGITS.to_sparse()},
        TypeError,
        "logits: expected a dense tensor, got layout torch.sparse_coo",
    ),
    "ignore_index beyond 64 bits": (
        {"ignore_index": 2**70},
        ValueError,
        f"ignore_index: must fit 64 bits, got {2**70}",
    ),
    "z_loss beyond floats": ({"z_loss": 10**400}, ValueError, "z_loss: must be finite, got an int beyond floats"),
    "z_loss a bool": ({"z_loss": True}, TypeError, "z_loss: expected a number, got bool True"),
    "return_lse not a bool": ({"return_lse": "no"}, TypeError, "return_lse: expected True or False, got str 'no'"),
    "axis not an int": ({"axis": 1.0}, TypeError, "axis: expected an int, got float"),
    "labels not a tensor": ({"labels": [0, 1, 2, 3]}, TypeError, "labels: expected a torch.Tensor, got list"),
    "labels too few": (
        {"labels": LABELS[:3]},
        ValueError,
        "labels: expected shape (4,) for logits of shape (4, 5) with class axis 1, got (3,)",
    ),
    "labels of another rank": (
        {"labels": LABELS[:, None]},
        ValueError,
        "labels: expected shape (4,) for logits of shape (4, 5) with class axis 1, got (4, 1)",
    ),
    "labels for another axis": (
        {"axis": 0},
        ValueError,
        "labels: expected shape (5,) for logits of shape (4, 5) with class axis 0, got (4,)",
    ),
    "labels int32": ({"labels": LABELS.int()}, TypeError, "labels: dtype must be int64 or uint8, got torch.int32"),
    "labels bool": ({"labels": LABELS.bool()}, TypeError, "labels: dtype must be int64 or uint8, got torch.bool"),
    "labels floating": (
        {"labels": LABELS.float()},
        TypeError,
        "labels: dtype must be int64 or uint8, got torch.float32",
    ),
    "labels elsewhere": ({"labels": LABELS.to("meta")}, ValueError, f"labels: is on meta, but logits are on {DEVICE}"),
    "sample_weight not a tensor": (
        {"sample_weight": 2.0},
        TypeError,
        "sample_weight: expected a torch.Tensor, got float",
    ),
    "sample_weight too few": (
        {"sample_weight": torch.ones(3)},
        ValueError,
        "sample_weight: expected shape (4,) for logits of shape (4, 5) with class axis 1, got (3,)",
    ),
    "sample_weight of integers": (
        {"sample_weight": torch.ones(4, dtype=torch.int64)},
        TypeError,
        "sample_weight: dtype must be floating, got torch.int64",
    ),
    "sample_weight elsewhere": (
        {"sample_weight": torch.ones(4, device="meta")},
        ValueError,
        f"sample_weight: is on meta, but logits are on {DEVICE}",
    ),
    "H a matrix": (
        {"H": torch.eye(5)},
        TypeError,
        "H: expected an lgd.Infogain, got Tensor; wrap a matrix with lgd.Infogain.dense(matrix)",
    ),
    "H a string": ({"H": "identity"}, TypeError, "H: expected an lgd.Infogain, got str"),
    "H dense of the wrong size": (
        {"H": Infogain.dense(torch.eye(6))},
        ValueError,
        "H: is for 6 classes, but logits of shape (4, 5) have 5 along axis 1",
    ),
    "H identity of the wrong size": (
        {"H": Infogain.identity(4)},
        ValueError,
        "H: is for 4 classes, but logits of shape (4, 5) have 5 along axis 1",
    ),
    "H diagonal of the wrong size": (
        {"H": Infogain.diagonal(torch.ones(3))},
        ValueError,
        "H: is for 3 classes, but logits of shape (4, 5) have 5 along axis 1",
    ),
    "H smoothing of the wrong size": (
        {"H": Infogain.label_smoothing(0.1, 7)},
        ValueError,
        "H: is for 7 classes, but logits of shape (4, 5) have 5 along axis 1",
    ),
    "H sparse of the wrong size": (
        {"H": Infogain.sparse(torch.eye(4))},
        ValueError,
        "H: is for 4 classes, but logits of shape (4, 5) have 5 along axis 1",
    ),
    "H elsewhere": (
        {"H": Infogain.dense(torch.eye(5)).to("meta")},
        ValueError,
        f"H: is on meta, but logits are on {DEVICE}; move it with H.to('{DEVICE}')",
    ),
    "reduction unknown": (
        {"reduction": "avg"},
        ValueError,
        "reduction: unknown value 'avg'; choose one of 'none', 'sum', 'mean'",
    ),
    "reduction None": (
        {"reduction": None},
        ValueError,
        "reduction: unknown value None; choose one of 'none', 'sum', 'mean'",
    ),
    "normalization unknown": (
        {"normalization": "all"},
        ValueError,
        "normalization: unknown value 'all'; choose one of 'full', 'valid', 'batch_size', 'none'",
    ),
    "normalization of a sum": (
        {"normalization": "full", "reduction": "sum"},
        ValueError,
        "normalization: 'full' needs reduction='mean', got reduction='sum'",
    ),
    "normalization of single losses": (
        {"normalization": "none", "reduction": "none"},
        ValueError,
        "normalization: 'none' needs reduction='mean', got reduction='none'",
    ),
    "ignore_index not an int": ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
    "ignore_index a bool": ({"ignore_index": True}, TypeError, "ignore_index: expected an int, got bool"),
    "ignore_index None": ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
    "z_loss NaN": ({"z_loss": NAN}, ValueError, "z_loss: must be finite, got nan"),
    "z_loss infinite": ({"z_loss": -INF}, ValueError, "z_loss: must be finite, got -inf"),
    "z_loss not a number": ({"z_loss": "small"}, TypeError, "z_loss: expected a number, got str"),
}


@pytest.mark.parametrize("case", LOSS_CASES)
def test_the_loss_function(case):
    changed, error, message = LOSS_CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        lgd.softmax_infogain_loss(**{"logits": LOGITS, "labels": LABELS, **changed})


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        lgd.softmax_infogain_loss(LOGITS, LABELS, None, torch.ones(4))
    with pytest.raises(TypeError, match="positional"):
        Loss(None, torch.ones(5))
    with pytest.raises(TypeError, match="size_average"):
        lgd.softmax_infogain_loss(LOGITS, LABELS, size_average=True)


# ---------------------------------------------------------------------------------------------------------------------
# Labels out of range
# ---------------------------------------------------------------------------------------------------------------------

H_OF_EACH_KIND = {
    "none": None,
    "identity": Infogain.identity(5),
    "diagonal": Infogain.diagonal(torch.ones(5), background=0.1),
    "label_smoothing": Infogain.label_smoothing(0.1, 5),
    "sparse": Infogain.sparse(torch.eye(5)),
    "dense": Infogain.dense(torch.rand(5, 5)),
}


@pytest.mark.parametrize("kind", H_OF_EACH_KIND)
@pytest.mark.parametrize("label", [-1, 5, 255, -(2**62), 2**62])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_label_out_of_range(backend, raising_labels, kind, label, reduction):
    logits = LOGITS.clone().requires_grad_()
    labels = torch.tensor([0, -100, label, label + 1])
    with pytest.raises(IndexError, match=f"labels: value {label} at position 2 is out of range for 5 classes"):
        lgd.softmax_infogain_loss(logits, labels, H_OF_EACH_KIND[kind], reduction=reduction)
    assert torch.equal(logits, LOGITS)
    assert labels.tolist() == [0, -100, label, label + 1]


def test_the_position_is_that_of_the_first_offending_label(backend, raising_labels):
    """In the flattened labels, whatever their strides and however many threads look for it."""
    labels = torch.zeros(300, 40, dtype=torch.int64).T
    labels[3, 250] = labels[3, 251] = labels[20, 1] = 9
    with pytest.raises(IndexError, match=f"labels: value 9 at position {3 * 300 + 250} is out of range for 6 classes"):
        lgd.softmax_infogain_loss(torch.randn(40, 6, 300), labels)


def test_uint8_labels_out_of_range(backend, raising_labels):
    with pytest.raises(IndexError, match="labels: value 255 at position 1 is out of range for 5 classes"):
        lgd.softmax_infogain_loss(LOGITS, torch.tensor([0, 255, 0, 0], dtype=torch.uint8))


def test_an_ignore_index_that_no_label_has_lets_no_label_through(backend, raising_labels):
    with pytest.raises(IndexError, match="labels: value -100 at position 0 is out of range for 5 classes"):
        lgd.softmax_infogain_loss(LOGITS, torch.full((4,), -100), ignore_index=-1)


@pytest.mark.parametrize(
    "options",
    [{"weight": torch.ones(5)}, {"label_smoothing": 0.1}, {"weight": torch.ones(5), "label_smoothing": 0.1}],
    ids=str,
)
def test_a_label_out_of_range_in_the_module(backend, raising_labels, options):
    for reduction in ("none", "sum", "mean"):
        with pytest.raises(IndexError, match="labels: value 7 at position 3 is out of range for 5 classes"):
            Loss(reduction=reduction, **options)(LOGITS, torch.tensor([0, 1, 2, 7]))


# ---------------------------------------------------------------------------------------------------------------------
# Infogain
# ---------------------------------------------------------------------------------------------------------------------


def csr(crow, col, values, size=(3, 3)):
    return torch.sparse_csr_tensor(
        torch.tensor(crow), torch.tensor(col), torch.tensor(values), size, check_invariants=False
    )


def with_entry(value):
    matrix = torch.ones(3, 3)
    matrix[1, 2] = value
    return matrix


FLOATING = "must be float64, float32, bfloat16 or float16"
ZERO, ONES = torch.zeros(4, dtype=torch.int64), torch.ones(3)
INFOGAIN_CASES = {
    "a matrix and a background": (
        lambda: Infogain("mine", 3, InfogainParts(matrix=torch.eye(3), background=torch.tensor(0.1))),
        ValueError,
        "parts: matrix and background cannot be combined",
    ),
    "a diagonal and stored values": (
        lambda: Infogain("mine", 3, InfogainParts(diagonal=ONES, crow=ZERO, col=ZERO[:0], values=ONES[:0])),
        ValueError,
        "parts: diagonal and values cannot be combined",
    ),
    "dense not a tensor": (lambda: Infogain.dense([[1.0]]), TypeError, "matrix: expected a torch.Tensor, got list"),
    "dense of integers": (
        lambda: Infogain.dense(torch.ones(3, 3, dtype=torch.int64)),
        TypeError,
        f"matrix: dtype {FLOATING}, got torch.int64",
    ),
    "dense of one dimension": (
        lambda: Infogain.dense(torch.ones(3)),
        ValueError,
        "matrix: expected 2 dimensions, got 1 (shape (3,))",
    ),
    "dense not square": (
        lambda: Infogain.dense(torch.ones(3, 4)),
        ValueError,
        "matrix: must be square (C, C), got (3, 4)",
    ),
    "dense with NaN": (
        lambda: Infogain.dense(with_entry(NAN)),
        ValueError,
        "matrix: every entry must be finite, found nan at [1, 2]",
    ),
    "dense with inf": (
        lambda: Infogain.dense(with_entry(-INF)),
        ValueError,
        "matrix: every entry must be finite, found -inf at [1, 2]",
    ),
    "diagonal of two dimensions": (
        lambda: Infogain.diagonal(torch.ones(3, 3)),
        ValueError,
        "weight: expected 1 dimensions, got 2 (shape (3, 3))",
    ),
    "diagonal not a tensor": (lambda: Infogain.diagonal([1.0]), TypeError, "weight: expected a torch.Tensor, got list"),
    "diagonal with inf": (
        lambda: Infogain.diagonal(torch.tensor([1.0, INF])),
        ValueError,
        "weight: every entry must be finite, found inf at [1]",
    ),
    "background NaN": (
        lambda: Infogain.diagonal(torch.ones(3), background=NAN),
        ValueError,
        "background: must be finite, got nan",
    ),
    "background a vector": (
        lambda: Infogain.diagonal(torch.ones(3), background=torch.ones(3)),
        ValueError,
        "background: expected 0 dimensions, got 1 (shape (3,))",
    ),
    "epsilon too large": (
        lambda: Infogain.label_smoothing(1.5, 3),
        ValueError,
        "epsilon: must be between 0 and 1, got 1.5",
    ),
    "epsilon negative": (
        lambda: Infogain.label_smoothing(-0.1, 3),
        ValueError,
        "epsilon: must be between 0 and 1, got -0.1",
    ),
    "epsilon NaN": (lambda: Infogain.label_smoothing(NAN, 3), ValueError, "epsilon: must be finite, got nan"),
    "smoothing of no classes": (
        lambda: Infogain.label_smoothing(0.1, 0),
        ValueError,
        "num_classes: there must be at least 1 class, got 0",
    ),
    "sparse not a tensor": (lambda: Infogain.sparse([[1.0]]), TypeError, "matrix: expected a torch.Tensor, got list"),
    "sparse not square": (
        lambda: Infogain.sparse(torch.ones(3, 4)),
        ValueError,
        "matrix: must be square (C, C), got (3, 4)",
    ),
    "sparse of three dimensions": (
        lambda: Infogain.sparse(torch.ones(3, 3, 3)),
        ValueError,
        "matrix: must be square (C, C), got (3, 3, 3)",
    ),
    "sparse with NaN": (
        lambda: Infogain.sparse(with_entry(NAN)),
        ValueError,
        "matrix: every entry must be finite, found nan at [5]",
    ),
    "sparse of integers": (
        lambda: Infogain.sparse(torch.eye(3, dtype=torch.int64)),
        TypeError,
        f"matrix: dtype {FLOATING}, got torch.int64",
    ),
    "sparse background inf": (
        lambda: Infogain.sparse(torch.eye(3), background=INF),
        ValueError,
        "background: must be finite, got inf",
    ),
    "sparse column too large": (
        lambda: Infogain.sparse(csr([0, 1, 1, 2], [0, 3], [1.0, 1.0])),
        ValueError,
        "matrix: col_indices must be in [0, 3)",
    ),
    "sparse column negative": (
        lambda: Infogain.sparse(csr([0, 1, 1, 2], [-1, 0], [1.0, 1.0])),
        ValueError,
        "matrix: col_indices must be in [0, 3)",
    ),
    "sparse column repeated": (
        lambda: Infogain.sparse(csr([0, 2, 2, 2], [1, 1], [1.0, 1.0])),
        ValueError,
        "matrix: col_indices must be sorted and distinct within each row",
    ),
    "sparse columns unsorted": (
        lambda: Infogain.sparse(csr([0, 2, 2, 2], [1, 0], [1.0, 1.0])),
        ValueError,
        "matrix: col_indices must be sorted and distinct within each row",
    ),
    "sparse rows falling": (
        lambda: Infogain.sparse(csr([0, 2, 1, 2], [0, 1], [1.0, 1.0])),
        ValueError,
        "matrix: crow_indices must rise from 0 to the number of stored entries 2",
    ),
    "sparse rows beyond the end": (
        lambda: Infogain.sparse(csr([0, 1, 2, 9], [0, 1], [1.0, 1.0])),
        ValueError,
        "matrix: crow_indices must rise from 0 to the number of stored entries 2",
    ),
    "distance negative": (
        lambda: Infogain.from_distance(with_entry(-1.0)),
        ValueError,
        "distance: no entry may be negative, found -1.0 at [1, 2]",
    ),
    "distance NaN": (
        lambda: Infogain.from_distance(with_entry(NAN)),
        ValueError,
        "distance: every entry must be finite, found nan at [1, 2]",
    ),
    "distance not square": (
        lambda: Infogain.from_distance(torch.ones(3, 4)),
        ValueError,
        "distance: must be square (C, C), got (3, 4)",
    ),
    "distance of integers": (
        lambda: Infogain.from_distance(torch.ones(3, 3, dtype=torch.int32)),
        TypeError,
        f"distance: dtype {FLOATING}, got torch.int32",
    ),
    "beta NaN": (
        lambda: Infogain.from_distance(torch.ones(3, 3), beta=NAN),
        ValueError,
        "beta: must be finite, got nan",
    ),
    "top_k zero": (
        lambda: Infogain.from_distance(torch.ones(3, 3), top_k=0),
        ValueError,
        "top_k: must be between 1 and the number of classes 3, got 0",
    ),
    "top_k too large": (
        lambda: Infogain.from_distance(torch.ones(3, 3), top_k=4),
        ValueError,
        "top_k: must be between 1 and the number of classes 3, got 4",
    ),
    "dense form of an identity of no size": (
        lambda: Infogain.identity().to_dense(),
        ValueError,
        "num_classes: this identity was made without a number of classes; give one",
    ),
    "identity of half a class": (
        lambda: Infogain.identity(2.5),
        TypeError,
        "num_classes: expected an int, got float 2.5",
    ),
    "dense of no classes": (
        lambda: Infogain.dense(torch.ones(0, 0)),
        ValueError,
        "matrix: there must be at least 1 class, got 0",
    ),
    "dense of a sparse tensor": (
        lambda: Infogain.dense(torch.eye(3).to_sparse()),
        TypeError,
        "matrix: expected a dense tensor, got layout torch.sparse_coo; see Infogain.sparse",
    ),
    "epsilon not a number": (
        lambda: Infogain.label_smoothing("a", 3),
        TypeError,
        "epsilon: expected a number, got str 'a'",
    ),
    "background not a number": (
        lambda: Infogain.diagonal(ONES, background=None),
        TypeError,
        "background: expected a number, got NoneType",
    ),
    "beta negative": (
        lambda: Infogain.from_distance(torch.ones(2, 2), beta=-1.0),
        ValueError,
        "beta: must not be negative, got -1.0",
    ),
    "beta not a number": (
        lambda: Infogain.from_distance(torch.ones(2, 2), beta="a"),
        TypeError,
        "beta: expected a number, got str 'a'",
    ),
    "top_k not an int": (
        lambda: Infogain.from_distance(torch.ones(2, 2), top_k=1.5),
        TypeError,
        "top_k: expected an int, got float 1.5",
    ),
    "sparse hybrid": (
        lambda: Infogain.sparse(
            torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2, 2), (2, 2), check_invariants=True)
        ),
        ValueError,
        "matrix: must store numbers, got a hybrid tensor with dense_dim 1",
    ),
    "identity of no classes": (
        lambda: Infogain.identity(0),
        ValueError,
        "num_classes: there must be at least 1 class, got 0",
    ),
    "dense form of another size": (
        lambda: Infogain.dense(torch.eye(3)).to_dense(4),
        ValueError,
        "num_classes: is 4, but H is for 3 classes",
    ),
}


@pytest.mark.parametrize("case", INFOGAIN_CASES)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_infogain(case):
    make, error, message = INFOGAIN_CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------------------------------

H5 = Infogain.dense(torch.eye(5))
MODULE_CASES = {
    "H a matrix": (lambda: Loss(torch.eye(5)), TypeError, "H: expected an lgd.Infogain or None, got Tensor"),
    "H and weight": (
        lambda: Loss(H5, weight=torch.ones(5)),
        ValueError,
        f"H={H5!r} together with weight or label_smoothing: those are kinds of H",
    ),
    "H and label_smoothing": (
        lambda: Loss(H5, label_smoothing=0.1),
        ValueError,
        f"H={H5!r} together with weight or label_smoothing: those are kinds of H",
    ),
    "label_smoothing too large": (
        lambda: Loss(label_smoothing=1.1),
        ValueError,
        "label_smoothing: must be between 0 and 1, got 1.1",
    ),
    "label_smoothing NaN": (
        lambda: Loss(label_smoothing=NAN),
        ValueError,
        "label_smoothing: must be finite, got nan",
    ),
    "weight a matrix": (
        lambda: Loss(weight=torch.ones(5, 5)),
        ValueError,
        "weight: expected a floating tensor of shape (C,), got torch.float32 (5, 5)",
    ),
    "weight of integers": (
        lambda: Loss(weight=torch.ones(5, dtype=torch.int64)),
        ValueError,
        "weight: expected a floating tensor of shape (C,), got torch.int64 (5,)",
    ),
    "weight a list": (lambda: Loss(weight=[1.0] * 5), TypeError, "weight: expected a torch.Tensor, got list"),
    "reduction unknown": (
        lambda: Loss(reduction="avg"),
        ValueError,
        "reduction: unknown value 'avg'; choose one of 'none', 'sum', 'mean'",
    ),
    "normalization unknown": (
        lambda: Loss(normalization="all"),
        ValueError,
        "normalization: unknown value 'all'; choose one of 'full', 'valid', 'batch_size', 'none'",
    ),
    "normalization of a sum": (
        lambda: Loss(normalization="full", reduction="sum"),
        ValueError,
        "normalization: 'full' needs reduction='mean', got reduction='sum'",
    ),
    "z_loss infinite": (lambda: Loss(z_loss=INF), ValueError, "z_loss: must be finite, got inf"),
    "ignore_index a float": (lambda: Loss(ignore_index=0.0), TypeError, "ignore_index: expected an int, got float"),
    "weight of another size": (
        lambda: Loss(weight=torch.ones(6))(LOGITS, LABELS),
        ValueError,
        "weight: has 6 entries, but logits of shape (4, 5) have 5 classes along axis 1",
    ),
    "weight of another size, probabilities": (
        lambda: Loss(weight=torch.ones(6))(LOGITS, LOGITS.softmax(1)),
        ValueError,
        "weight: has 6 entries, but logits of shape (4, 5) have 5 classes along axis 1",
    ),
    "H of another size": (
        lambda: Loss(H5)(torch.randn(4, 6), LABELS),
        ValueError,
        "H: is for 5 classes, but logits of shape (4, 6) have 6 along axis 1",
    ),
    "probabilities of another shape": (
        lambda: Loss()(LOGITS, torch.ones(4, 6)),
        ValueError,
        "labels: class probabilities must have the logits' shape (4, 5), got (4, 6)",
    ),
    "probabilities and ignore_index": (
        lambda: Loss(ignore_index=2)(LOGITS, LOGITS.softmax(1)),
        ValueError,
        "ignore_index: 2 has no meaning for class-probability labels",
    ),
    "probabilities elsewhere": (
        lambda: Loss()(LOGITS, LOGITS.softmax(1).to("meta")),
        ValueError,
        f"labels: is on meta, but logits are on {DEVICE}",
    ),
    "probabilities and H": (
        lambda: Loss(H5)(LOGITS, LOGITS.softmax(1)),
        TypeError,
        "labels: class probabilities (torch.float32) cannot be combined with H=Infogain.",
    ),
    "labels too few": (
        lambda: Loss()(LOGITS, LABELS[:2]),
        ValueError,
        "labels: expected shape (4,) for logits of shape (4, 5) with class axis 1, got (2,)",
    ),
    "sample_weight too few": (
        lambda: Loss()(LOGITS, LABELS, torch.ones(2)),
        ValueError,
        "sample_weight: expected shape (4,) for logits of shape (4, 5) with class axis 1, got (2,)",
    ),
}


@pytest.mark.parametrize("case", MODULE_CASES)
def test_the_module(case):
    make, error, message = MODULE_CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_labels_of_a_device_are_checked_on_request(monkeypatch):
    """On the CPU they always are; a meta tensor has no labels, but the call shows."""
    calls = []
    monkeypatch.setattr(ops, "check_labels", lambda *args: calls.append(args))
    logits, labels = torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    for options in ({}, {"check_labels": False}, {"reduction": "none"}):
        lgd.softmax_infogain_loss(logits, labels, **options)
    assert calls == []
    lgd.softmax_infogain_loss(logits, labels, ignore_index=1, check_labels=True)
    ((checked, ignore_index, n_classes),) = calls
    assert (checked.shape, ignore_index, n_classes) == ((4, 1), 1, 3)


def test_the_check_of_labels():
    check = torch.ops.lgd_kernels.check_labels.default
    labels = torch.tensor([[0], [2], [-100], [3], [-1]])
    assert check(labels[:3], -100, 3) is None
    with pytest.raises(IndexError, match="labels: value 3 at position 3 is out of range for 3 classes"):
        check(labels, -100, 3)
    with pytest.raises(TypeError, match="check_labels: expected True or False, got int 1"):
        lgd.softmax_infogain_loss(torch.randn(2, 3), torch.tensor([0, 1]), check_labels=1)


# ---------------------------------------------------------------------------------------------------------------------
# Backends, and the compiled ops themselves
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_backend():
    message = "name: unknown backend 'fast'; choose one of auto, cpp, cuda, triton, reference"
    with pytest.raises(ValueError, match=message), backends.force("fast"):
        pass


def test_an_unknown_backend_in_the_environment():
    result = subprocess.run(
        [sys.executable, "-c", "import lgd_kernels"],
        env={**os.environ, "LGD_BACKEND": "fast"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "LGD_BACKEND: unknown backend 'fast'; choose one of auto, cpp, cuda, triton, reference" in result.stderr


def test_force_puts_the_backend_back_after_an_error():
    before = backends.describe()
    with pytest.raises(KeyError), backends.force("reference"):
        raise KeyError
    assert backends.describe() == before


@pytest.mark.usefixtures("compiled")
def test_a_compiled_op_does_not_read_beyond_its_arguments():
    logits, labels, one = torch.randn(4, 5, 1), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    parts = [None] * 6
    dense = [torch.eye(5), *[None] * 5]
    for arguments in (
        (logits[0], labels, *parts, -100, 0.0, one, True, True),
        (logits, labels[:2], *parts, -100, 0.0, one, True, True),
        (logits, labels, *parts, -100, 0.0, one[:2], True, True),
        (logits, labels, *parts, -100, 0.0, one.double(), True, True),
        (logits, labels, torch.eye(3), *parts[1:], -100, 0.0, one, True, True),
        (logits, labels, None, None, torch.ones(3), None, None, None, -100, 0.0, one, True, True),
        (
            logits,
            labels,
            None,
            None,
            None,
            torch.zeros(3, dtype=torch.int64),
            labels[:, 0],
            one[:, 0],
            -100,
            0.0,
            one,
            True,
            True,
        ),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.softmax_infogain(*arguments)
    for arguments in (
        (logits, labels, *dense, -100, 0.0, one[:2], None),
        (logits, labels, *dense, -100, 0.0, one, one[:2]),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            ops.softmax_infogain_backward(*arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.softmax_infogain_double_backward(logits, labels, *dense, -100, 0.0, one, None, logits[:2])
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.softmax_infogain_backward_(logits[:2].clone(), one, logits, labels, *dense, -100, 0.0, one, None)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ops.softmax_infogain_backward_matrix(logits, labels, 5, -100, one[:2])
