"""What the Triton kernels promise beyond the other backends, in Triton's interpreter.

Not collected by itself: test_triton_softmax_infogain.py starts a process for it."""

from __future__ import annotations

import pytest
import torch
from cases import KINDS, SOME_KINDS

from lgd_kernels import backends, ops, reference
from lgd_kernels.triton_kernels import common
from lgd_kernels.triton_kernels import softmax_infogain as kernels

pytestmark = pytest.mark.usefixtures("nan_prefill")
by_some_kinds = pytest.mark.parametrize("kind", [*SOME_KINDS, "dense_with_stored_values", "dense_with_diagonal"])
BAD_LABELS = (-1, 19, 255, 2**40, -(2**40))


def rows_with(labels: torch.Tensor, kind: str, inner: int = 1):
    """(logits (O, 19, I), labels (O, I), H's parts, ignore_index, z_loss)."""
    H, _ = KINDS[kind](19)
    logits = torch.randn(len(labels), 19, inner) * 3
    return logits, labels[:, None].repeat(1, inner), *(H.parts if H else [None] * 6), -100, 0.1


@pytest.mark.parametrize("inner", [1, 3])
@by_some_kinds
def test_a_label_out_of_range_costs_its_row_only(kind, inner):
    """Loss NaN, gradient 0, as the reference on a device; and nothing is read or written outside the tensors."""
    labels = torch.tensor([4, *BAD_LABELS, -100, 7])
    rows = rows_with(labels, kind, inner)
    upstream = torch.rand(rows[1].shape)
    loss, lse, grad, norm = kernels.softmax_infogain(*rows, upstream, True, True)
    wrong, good = slice(1, 6), [0, 7]
    assert loss[wrong].isnan().all() and (grad[wrong] == 0).all() and (norm[wrong] == 0).all()
    assert (loss[6] == 0).all() and (grad[6] == 0).all() and lse.isfinite().all()
    fine = (rows[0][good], rows[1][good], *rows[2:])
    expected = reference.softmax_infogain(*fine, upstream[good], True, True)
    for got, want in zip((loss, lse, grad, norm), expected, strict=True):
        torch.testing.assert_close(got[good], want)
    assert (kernels.softmax_infogain_backward(*rows, upstream, None)[wrong] == 0).all()
    product, of_upstream, _ = kernels.softmax_infogain_double_backward(*rows, upstream, None, torch.randn(grad.shape))
    assert (product[wrong] == 0).all() and (of_upstream[wrong] == 0).all()
    of_matrix = kernels.softmax_infogain_backward_matrix(*rows[:2], 19, -100, upstream)
    torch.testing.assert_close(
        of_matrix, reference.softmax_infogain_backward_matrix(*fine[:2], 19, -100, upstream[good])
    )


def test_a_label_out_of_range_raises_on_the_cpu():
    rows = rows_with(torch.tensor([4, 19]), "dense_negative")
    with backends.force("triton"), pytest.raises(IndexError, match="value 19 at position 1 is out of range for 19"):
        ops.softmax_infogain(*rows, None, False, False)


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("whole", [True, False], ids=["one tile", "several tiles"])
@by_some_kinds
def test_64_bit_offsets(kind, whole, inner, monkeypatch):
    """The specialization for tensors of more than 2^31 elements, on small ones."""
    monkeypatch.setattr(kernels, "tiles_for", lambda *args: common.Tiles(2, 32 if whole else 8, whole, 1))
    rows = rows_with(torch.tensor([4, 0, 18, -100, 7]), kind, inner)
    upstream = torch.rand(rows[1].shape)
    narrow = kernels.softmax_infogain(*rows, upstream, True, True)
    vector = torch.randn(rows[0].shape)
    narrow += kernels.softmax_infogain_double_backward(*rows, upstream, upstream, vector)
    seen = []
    launch = common.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *args, **options: seen.append(options["WIDE"]) or launch(*args, **options)
    )
    monkeypatch.setattr(kernels, "INT32_MAX", 2**20)
    wide = kernels.softmax_infogain(*rows, upstream, True, True)
    wide += kernels.softmax_infogain_double_backward(*rows, upstream, upstream, vector)
    assert seen == [True, True]
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b)


@by_some_kinds
def test_the_bits_of_a_row_do_not_depend_on_the_batch(kind):
    rows = rows_with(torch.randint(19, (13,)), kind)
    whole = kernels.softmax_infogain(*rows, torch.ones(13, 1), True, True)
    for i in (0, 5, 12):
        alone = kernels.softmax_infogain(
            rows[0][i : i + 1], rows[1][i : i + 1], *rows[2:], torch.ones(1, 1), True, True
        )
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a[0], b[i])


def test_many_tiles_of_equal_terms(monkeypatch):
    """All rounded alike when they are added one by one to a large term: the errors would add up."""
    monkeypatch.setattr(kernels, "tiles_for", lambda *args: common.Tiles(8, 16, False, 1))
    logits = torch.linspace(-9, -3, 8)[:, None].repeat(1, 4096)
    logits[:, 0] = 0
    labels = torch.zeros(8, 1, dtype=torch.int64)
    loss, *_ = kernels.softmax_infogain(logits[:, :, None], labels, *[None] * 6, -100, 0.0, None, False, False)
    exact = torch.logsumexp(logits.double(), 1, keepdim=True)
    assert ((loss - exact).abs() <= 2 * torch.finfo(torch.float32).eps * (1 + exact)).all()


def test_arguments_of_wrong_sizes():
    logits, labels, *rest = rows_with(torch.arange(4), "none")
    upstream = torch.ones(4, 1)
    for arguments in (
        (logits[0], labels, *rest, upstream, False, False),
        (logits, labels[:2], *rest, upstream, False, False),
        (logits, labels.int(), *rest, upstream, False, False),
        (logits, labels, *rest, upstream[:2], False, False),
        (logits, labels, *rest, upstream.double(), False, False),
        (logits, labels, torch.eye(3), *rest[1:], upstream, False, False),
        (logits, labels, None, None, torch.ones(3), *rest[3:], upstream, False, False),
    ):
        with pytest.raises((ValueError, TypeError)):
            kernels.softmax_infogain(*arguments)
    with pytest.raises(ValueError, match="grad_loss: expected shape"):
        kernels.softmax_infogain_backward_matrix(logits, labels, 19, -100, upstream[:2])
