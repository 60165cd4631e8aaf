"""Loss and gradient of softmax_infogain: forward and backward, into a fresh gradient, for every peer alike but one.

liger-kernel writes the gradient over the logits. It gets logits of its own, restored before each call outside the time:
in its favour, it needs no memory for a gradient. cut-cross-entropy takes hidden states and the weight of the layer that
makes the logits, never logits: it is a peer of that layer and this loss in one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

import lgd_kernels as lgd
from bench.peers import Expected, Outputs, Problem, compiled
from bench.workloads import SoftmaxInfogainWorkload
from lgd_kernels import backends, reference

EPSILON = 0.1  # of label smoothing
STORED_PER_ROW = 8  # of a sparse H

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """matrix: H as PyTorch needs it, None where H is the identity, smoothed or not. H: as lgd_kernels takes it.
    overwritten: the logits once more, for a peer that overwrites them."""

    logits: Tensor  # (N, C, ...), requires grad
    labels: Tensor  # (N, ...)
    matrix: Tensor | None  # (C, C)
    H: lgd.Infogain
    overwritten: Tensor | None = None

    def restore(self) -> None:
        """Undo what a call has left behind."""
        self.logits.grad = None
        if self.overwritten is not None:
            self.overwritten.data.copy_(self.logits.detach())


def make_data(workload: SoftmaxInfogainWorkload) -> Data:
    """Random logits, labels and H; the same ones every time."""
    device, dtype = workload.device, getattr(torch, workload.dtype)
    generator = torch.Generator(device).manual_seed(0)
    n_samples, n_classes, *inner = workload.shape
    logits = (3 * torch.randn(workload.shape, generator=generator, device=device)).to(dtype)
    labels = torch.randint(n_classes, (n_samples, *inner), generator=generator, device=device)
    matrix, H = _make_infogain(workload.infogain, n_classes, generator, dtype)
    overwritten = logits.clone().requires_grad_() if "liger" in workload.peers else None
    return Data(logits.requires_grad_(), labels, matrix, H.to(device), overwritten)


def _make_infogain(
    kind: str, n_classes: int, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor | None, lgd.Infogain]:
    if kind == "identity":
        return None, lgd.Infogain.identity()
    if kind == "label_smoothing":
        return None, lgd.Infogain.label_smoothing(EPSILON, n_classes)
    matrix = torch.rand(n_classes, n_classes, generator=generator, device=generator.device)
    if kind == "dense":  # rows sum to C / 2, far from 1
        matrix = matrix.to(dtype)
        return matrix, lgd.Infogain.dense(matrix)
    if kind == "sparse":
        stored = matrix >= matrix.topk(min(STORED_PER_ROW, n_classes), dim=1).values[:, -1:]
        matrix = (matrix * stored).to(dtype)
        return matrix, lgd.Infogain.sparse(matrix)
    raise ValueError(f"infogain: unknown kind {kind!r}")


# ---------------------------------------------------------------------------------------------------------------------
# The loss as users of PyTorch write it
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, _matrix: None) -> Tensor:
    return functional.cross_entropy(logits, labels)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, _matrix: None) -> Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=EPSILON)


def soft_target_cross_entropy(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """The eager peer for a matrix: at (8192, 1000), 2 threads, 14.6 ms; -(H[l] * log_softmax(x)).sum() / N 15.1."""
    return functional.cross_entropy(logits, matrix[labels])


def log_sum_exp_form(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """The compiled peer for a matrix: at (8192, 1000), 2 threads, 5.4 ms; soft targets compile to 7.1 ms."""
    per_row = matrix.sum(1)[labels] * torch.logsumexp(logits, 1) - (matrix[labels] * logits).sum(1)
    return per_row.mean()


def log_sum_exp_of_rows(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """The same on a GPU: the gather is fused, and a sum over all of H would read 2 GB for 32,000 classes."""
    rows = matrix[labels]
    return (rows.sum(1) * torch.logsumexp(logits, 1) - (rows * logits).sum(1)).mean()


EAGER = {
    "identity": cross_entropy,
    "label_smoothing": smoothed_cross_entropy,
    "dense": soft_target_cross_entropy,
    "sparse": soft_target_cross_entropy,
}
COMPILED = {
    "cpu": EAGER | {"dense": log_sum_exp_form, "sparse": log_sum_exp_form},
    "cuda": EAGER | {"dense": log_sum_exp_of_rows, "sparse": log_sum_exp_of_rows},
}

# ---------------------------------------------------------------------------------------------------------------------
# The peers
# ---------------------------------------------------------------------------------------------------------------------


def loss_and_gradient(loss_function: Callable[..., Tensor], logits: Tensor, *rest) -> Outputs:
    loss = loss_function(logits, *rest)
    loss.backward()
    return {"loss": loss.detach(), "gradient": logits.grad}


def _copy(destination: Tensor, source: Tensor) -> Outputs:
    return {"copy": destination.copy_(source)}


def _liger(kind: str, data: Data) -> Callable[[], Outputs]:
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

    criterion = LigerCrossEntropyLoss(label_smoothing=EPSILON if kind == "label_smoothing" else 0.0)

    def call() -> Outputs:
        loss = criterion(data.overwritten, data.labels)
        (gradient,) = torch.autograd.grad(loss, data.overwritten)  # backward() would copy it into .grad
        return {"loss": loss.detach(), "gradient": gradient}

    return call


def _forced(backend: str, call: Callable[[], Outputs]) -> Outputs:
    with backends.force(backend):
        return call()


def is_there(peer: str, workload: SoftmaxInfogainWorkload) -> bool:
    """Whether this machine has the peer: its package, or a backend of ours with kernels for the device."""
    if peer == "liger":
        return importlib.util.find_spec("liger_kernel") is not None
    if peer in ("cuda", "triton"):
        with contextlib.suppress(ValueError, RuntimeError), backends.force(peer):
            return backends.implementation(workload.operation.op, workload.device) is not reference
        return False
    return True


def _call(peer: str, workload: SoftmaxInfogainWorkload, data: Data) -> Callable[[], Outputs]:
    kind = workload.infogain
    ours = functools.partial(loss_and_gradient, lgd.softmax_infogain_loss, data.logits, data.labels, data.H)
    in_pytorch = (data.logits, data.labels, data.matrix)
    if peer == "copy":
        source = data.logits.detach()
        return functools.partial(_copy, torch.zeros_like(source), source)  # zeros: the memory is there already
    if peer == "eager":
        return functools.partial(loss_and_gradient, EAGER[kind], *in_pytorch)
    if peer == "compiled":  # untuned: the same times
        return functools.partial(
            loss_and_gradient, compiled(COMPILED[workload.device][kind], workload.device), *in_pytorch
        )
    if peer == "liger":
        return _liger(kind, data)
    if peer in ("cuda", "triton"):
        return functools.partial(_forced, peer, ours)
    if peer == "ours":
        return ours
    raise ValueError(f"peers: unknown peer {peer!r}")


def prepare(workload: SoftmaxInfogainWorkload) -> Problem:
    """The peers of a workload on the same logits."""
    torch.compiler.reset()  # a function compiled for another size would be compiled again for any size
    peers = tuple(peer for peer in workload.peers if is_there(peer, workload))
    data = make_data(dataclasses.replace(workload, peers=peers))
    stored = sum(part.nbytes for part in data.H.parts if part is not None)
    if data.H.parts.matrix is not None:  # no more rows of it than there are labels
        stored = min(stored, data.labels.numel() * data.H.parts.matrix[0].nbytes)
    return Problem(
        calls={peer: _call(peer, workload, data) for peer in peers},
        before_each_call=data.restore,
        expected=lambda: expected_outputs(workload.infogain, data),
        copied_bytes=2 * data.logits.nbytes,
        least_bytes=2 * data.logits.nbytes + stored,  # read the logits and H, write the gradient
        flops=0,
        device=workload.device,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The right outputs
# ---------------------------------------------------------------------------------------------------------------------


def _rows_of_infogain(kind: str, labels: Tensor, n_classes: int, matrix: Tensor | None) -> Tensor:
    """H[labels] in float64, (R, C) for labels (R,)."""
    if matrix is not None:
        return matrix[labels].double()
    epsilon = EPSILON if kind == "label_smoothing" else 0.0
    rows = torch.full((len(labels), n_classes), epsilon / n_classes, dtype=torch.float64, device=labels.device)
    return rows.scatter_(1, labels.unsqueeze(1), 1 - epsilon + epsilon / n_classes)


def expected_outputs(kind: str, data: Data) -> dict[str, Expected]:
    """Straight from the equations, in float64: loss_i = -sum_j H[l, j] log p_j and grad_i = s_l p - H[l], over N.

    The tolerance is what float32 sums of C terms lose, which grows with sqrt(C), and one rounding each of log p and of
    the result to the logits' dtype (PyTorch keeps log p of bfloat16 logits in bfloat16).
    """
    logits = data.logits.detach()
    n_classes = logits.shape[1]
    log_p = logits.double().movedim(1, -1).reshape(-1, n_classes).log_softmax(1)  # (R, C)
    h = _rows_of_infogain(kind, data.labels.flatten(), n_classes, data.matrix)
    rounding = torch.finfo(logits.dtype).eps * (1 + float(log_p.abs().max()))
    tolerance = torch.finfo(torch.float32).eps * math.sqrt(n_classes) + rounding

    def in_the_shape_of_logits(rows: Tensor) -> Tensor:
        return rows.reshape(*data.labels.shape, n_classes).movedim(-1, 1)

    terms = h * log_p / len(h)
    loss = Expected(-terms.sum(), terms.abs().sum(), tolerance)
    s_p = h.sum(1, keepdim=True) * log_p.exp()
    gradient = Expected(
        in_the_shape_of_logits((s_p - h) / len(h)), in_the_shape_of_logits((s_p + h) / len(h)), tolerance
    )
    copy = Expected(logits.double(), logits.double().abs(), 0.0)
    return {"loss": loss, "gradient": gradient, "copy": copy}
