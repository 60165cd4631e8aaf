"""Gradients too large for the caches: they are written around them, into memory that is kept (huge_pages.h)."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from cases import KINDS, SOME_KINDS

import lgd_kernels as lgd

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("compiled", "nan_prefill")]
HUGE_PAGE = 2 << 20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")


def gradient(logits: torch.Tensor, labels: torch.Tensor, H: lgd.Infogain | None) -> torch.Tensor:
    logits = logits.detach().requires_grad_()
    loss = lgd.softmax_infogain_loss(logits, labels, H, reduction="sum", z_loss=0.01)
    return torch.autograd.grad(loss, logits)[0]


def check_against_parts(logits, labels, H, parts: int) -> None:
    """What is written around the cache has the same bits as what is written through it (and is tested elsewhere)."""
    whole = gradient(logits, labels, H)
    assert whole.nbytes >= 16 << 20 > whole.nbytes / parts
    for part, x, y in zip(*(t.tensor_split(parts) for t in (whole, logits, labels)), strict=True):
        assert torch.equal(part, gradient(x, y, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C", [1001, 4099])  # odd: every row has another alignment
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_rows(kind, C, dtype):
    n_rows = (17 << 20) // (C * dtype.itemsize)
    labels = torch.randint(C, (n_rows,))
    labels[::7] = -100
    labels[1], labels[2] = 0, C - 1
    check_against_parts(torch.randn(n_rows, C, dtype=dtype), labels, KINDS[kind](C)[0], 3)


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("kind", ["none", "label_smoothing", "sparse"])
@pytest.mark.parametrize(("n_rows", "C"), [(129, 33_000), (3, 1_500_000)])
def test_rows_of_several_chunks(threads, n_rows, C, kind, n_threads):
    """Entries of H in every chunk, and between them chunks without: none may be touched before its turn."""
    labels = torch.randint(C, (n_rows,))
    labels[0], labels[1], labels[2] = 0, C - 1, 32_768
    H = {"none": None, "label_smoothing": lgd.Infogain.label_smoothing(0.1, C)}.get(kind)
    if kind == "sparse":
        index = torch.stack([labels, (labels + C // 2) % C])
        H = lgd.Infogain.sparse(torch.sparse_coo_tensor(index, torch.rand(n_rows), (C, C), check_invariants=True))
    torch.set_num_threads(n_threads)
    check_against_parts(torch.randn(n_rows, C), labels, H, 3)


@pytest.mark.parametrize("size", [320, 321])  # rows of an image aligned for vectors, and not
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_images(kind, size):
    labels = torch.randint(21, (2, size, size))
    labels[:, ::5] = -100
    check_against_parts(torch.randn(2, 21, size, size), labels, KINDS[kind](21)[0], 2)


@on_linux
def test_memory_is_kept_for_the_next_gradient():
    logits, labels = torch.randn(900, 1000), torch.randint(1000, (900,))
    first = gradient(logits, labels, None)
    address = first.data_ptr()
    assert address % HUGE_PAGE == 0
    second = gradient(logits, labels, None)
    assert abs(second.data_ptr() - address) >= first.nbytes
    assert torch.equal(first, second)
    del first
    assert gradient(logits, labels, None).data_ptr() == address


@on_linux
def test_more_than_256_megabytes_are_given_back():
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    logits = torch.zeros(1, 1000).expand(80_000, 1000)
    labels = torch.zeros(80_000, dtype=torch.int64)
    gc.collect()
    before = resident_bytes()
    result = gradient(logits, labels, None)
    assert result.nbytes > 300e6 and resident_bytes() - before > 300e6
    del result
    assert resident_bytes() - before < 60e6


@on_linux
def test_a_kept_gradient_is_ordinary_memory():
    logits, labels = torch.randn(600, 1000), torch.randint(1000, (600,))
    result = gradient(logits, labels, None)
    copy = result.clone()
    result.resize_(700, 1000)
    assert torch.equal(result[:600], copy)
    assert torch.equal(copy.share_memory_()[5], result[5])
