"""What only a CUDA device can show of softmax_infogain: streams, graphs, waiting, memory, labels that nobody checked.

Unlike the other tests these run without a default device, as users' code does, so that a tensor which the library makes
in the wrong place shows.
"""

from __future__ import annotations

import pytest
import torch
from cases import KINDS, REDUCTIONS, SOME_KINDS, dtype_name
from device import available

import lgd_kernels as lgd
from lgd_kernels import backends

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("no_default_device"),
]
CUDA = torch.device("cuda")
by_some_kinds = pytest.mark.parametrize("kind", SOME_KINDS)
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
LONGEST_ROWS = (10, 1000, 32_000, 128_256, 262_144)  # one for every way in which the kernels hold a row


@pytest.fixture
def no_default_device():
    before = torch.get_default_device()
    torch.set_default_device(None)
    yield
    torch.set_default_device(None if before.type == "cpu" else before)


@pytest.fixture(params=["cuda", "triton", "reference"])
def anyone(request):
    """Every backend that answers on a device."""
    if request.param not in available([request.param]):
        pytest.skip(f"backend {request.param!r} is not there")
    with backends.force(request.param):
        yield


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    """The backends that promise more than right results."""
    if request.param not in available([request.param]):
        pytest.skip(f"backend {request.param!r} is not there")
    with backends.force(request.param):
        yield


def make(kind: str, N: int, C: int, device: torch.device | str = CUDA):
    """(logits (N, C), labels, H) on the device; the same numbers everywhere."""
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(N, C), torch.randint(C, (N,))
    H, _ = KINDS[kind](C)
    return logits.to(device).requires_grad_(), labels.to(device), H and H.to(device)


def loss_and_gradient(logits, labels, H, **options):
    loss = lgd.softmax_infogain_loss(logits, labels, H, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def needs_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:g} GB of memory on the device, {free / 1e9:.1f} are free")


# ---------------------------------------------------------------------------------------------------------------------
# Where tensors are
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_made_is_where_the_arguments_are(anyone, kind):
    """Loss, gradient, second derivative and every other output, and they are near those of the CPU."""
    results = []
    for device in (CUDA, torch.device("cpu")):
        logits, labels, H = make(kind, 7, 19, device=device)
        labels[2] = -100
        weight = torch.linspace(0, 2, 7, device=device).requires_grad_()
        everything = dict.fromkeys(("return_probabilities", "return_lse", "return_grad_norm"), True)
        outputs = lgd.softmax_infogain_loss(logits, labels, H, sample_weight=weight, z_loss=0.01, **everything)
        gradients = torch.autograd.grad(outputs[0], (logits, weight), create_graph=True)
        (second,) = torch.autograd.grad(gradients[0].float().square().sum(), logits)
        results.append([x.detach() for x in (*outputs, *gradients, second)])
    on_device, on_cpu = results
    assert all(x.device.type == "cuda" for x in on_device)
    for x, expected in zip(on_device, on_cpu, strict=True):
        assert (x.cpu() - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


@by_some_kinds
def test_a_device_that_is_not_the_current_one(anyone, kind):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device only")
    expected = loss_and_gradient(*make(kind, 9, 1000))
    assert torch.cuda.current_device() == 0
    for got, wanted in zip(loss_and_gradient(*make(kind, 9, 1000, device="cuda:1")), expected, strict=True):
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got.cpu(), wanted.cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Streams, graphs, synchronization
# ---------------------------------------------------------------------------------------------------------------------


@by_reduction
@by_some_kinds
def test_a_graph_replays_forward_and_backward(kernels, kind, reduction):
    logits, labels, H = make(kind, 33, 1000)
    other_logits, other_labels = torch.randn(33, 1000, device=CUDA), torch.randint(1000, (33,), device=CUDA)
    expected = loss_and_gradient(other_logits.clone().requires_grad_(), other_labels, H, reduction=reduction)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is compiled or allocated in a first call is not captured
        loss_and_gradient(logits, labels, H, reduction=reduction)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = loss_and_gradient(logits, labels, H, reduction=reduction)

    logits.data.copy_(other_logits)
    labels.copy_(other_labels)
    graph.replay()
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


@by_reduction
@by_some_kinds
def test_kernels_wait_for_the_current_stream_and_for_no_other(kernels, kind, reduction):
    """The logits become what they are late, and on a stream that the default stream does not wait for."""
    fresh, labels, H = make(kind, 33, 1000)
    expected = loss_and_gradient(fresh, labels, H, reduction=reduction)
    logits = torch.full_like(fresh, torch.nan).requires_grad_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        logits.data.copy_(fresh.detach())
        results = loss_and_gradient(logits, labels, H, reduction=reduction)
    stream.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


@by_reduction
@by_some_kinds
def test_nothing_waits_for_the_device(kernels, kind, reduction):
    logits, labels, H = make(kind, 33, 1000)
    weight = torch.rand(33, device=CUDA)
    for mode in ("default", "error"):  # a first call may compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss_and_gradient(logits, labels, H, reduction=reduction)
            loss_and_gradient(logits, labels, H, reduction=reduction, sample_weight=weight, z_loss=0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# Bits and memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", LONGEST_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("smoothed", [False, True], ids=["", "smoothed"])
def test_every_run_gives_the_same_bits(kernels, smoothed, dtype, C):
    logits = torch.randn(2**21 // C, C, device=CUDA).to(dtype).requires_grad_()
    labels = torch.randint(C, (len(logits),), device=CUDA)
    arguments = logits, labels, lgd.Infogain.label_smoothing(0.1, C).to(CUDA) if smoothed else None
    first = loss_and_gradient(*arguments)
    for _ in range(5):
        for again, before in zip(loss_and_gradient(*arguments), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("C", [2**17, 10])
def test_more_than_2_31_elements(kernels, C):
    """The last rows, which lie beyond 32-bit offsets, get what they get alone."""
    needs_memory(30)
    N = 2**31 // C + 17
    logits = torch.empty(N, C, dtype=torch.bfloat16, device=CUDA).normal_().requires_grad_()
    labels = torch.randint(C, (N,), device=CUDA)
    loss, gradient = loss_and_gradient(logits, labels, None, reduction="none")
    last = logits.detach()[-20:].clone().requires_grad_()
    alone, gradient_alone = loss_and_gradient(last, labels[-20:], None, reduction="none")
    assert torch.equal(loss[-20:], alone)
    assert torch.equal(gradient[-20:], gradient_alone)


@pytest.mark.parametrize("kind", ["none", "dense_float32"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_gradient_is_all_the_memory_that_is_taken(kernels, reduction, kind):
    logits, labels, H = make(kind, 4096, 1000)
    loss_and_gradient(logits, labels, H, reduction=reduction)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_and_gradient(logits, labels, H, reduction=reduction)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.1 * logits.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Labels out of range
# ---------------------------------------------------------------------------------------------------------------------

WRONG = (-1, 1000, 1001, 255 + 2**32, 2**62, -(2**62))


@pytest.mark.parametrize("N", [8, 3000])
@by_some_kinds
def test_a_label_out_of_range_costs_its_row_and_no_other(anyone, kind, N):
    """Its loss is NaN and its gradient 0; and the device is as good as before."""
    logits, labels, H = make(kind, N, 1000)
    wrong = torch.arange(len(WRONG), device=CUDA) + N - len(WRONG)
    expected_loss, expected_gradient = loss_and_gradient(logits, labels, H, reduction="none")
    expected_loss[wrong], expected_gradient[wrong] = torch.nan, 0
    labels[wrong] = torch.tensor(WRONG, device=CUDA)
    loss, gradient = loss_and_gradient(logits, labels, H, reduction="none")
    torch.cuda.synchronize()
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gradient, expected_gradient)
    total, gradient = loss_and_gradient(logits, labels, H, reduction="sum")
    assert total.isnan()
    torch.testing.assert_close(gradient, expected_gradient)


MESSAGE = "labels: value 1000 at position 5 is out of range for 1000 classes"


def test_labels_are_checked_on_request(anyone):
    logits, labels, _ = make("none", 8, 1000)
    labels[5] = 1000
    with pytest.raises(IndexError, match=MESSAGE):
        lgd.softmax_infogain_loss(logits, labels, check_labels=True)


def test_labels_are_checked_in_all_calls_on_request(anyone, raising_labels):
    logits, labels, _ = make("none", 8, 1000)
    labels[5] = 1000
    with pytest.raises(IndexError, match=MESSAGE):
        lgd.softmax_infogain_loss(logits, labels)
