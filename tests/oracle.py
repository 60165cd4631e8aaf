"""What the losses must compute, straight from the equations, in extended precision (numpy's longdouble) and one row at
a time: rows (R, C), labels (R,), a dense H. It knows nothing of lgd_kernels.

Beside every value stands the magnitude of the terms that it is a sum of (`*_scale`): rounding errors are relative to
that, whatever cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
EXTENDED = np.longdouble


def array(tensor: Tensor) -> Array:
    """A tensor's exact values."""
    tensor = tensor.detach()
    return (
        (tensor.double() if tensor.is_floating_point() else tensor)
        .numpy(force=True)
        .astype(EXTENDED if tensor.is_floating_point() else np.int64)
    )


def rows_of(tensor: Tensor, axis: int) -> Tensor:
    """(..., C, ...) as (R, C)."""
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


class Rows(NamedTuple):
    """Everything about the rows; per-row entries have shape (R,), the others (R, C)."""

    loss: Array
    grad: Array  # of loss with respect to the row
    lse: Array
    p: Array
    norm: Array  # of grad
    log_p: Array
    slope: Array  # grad = weight * (slope p - H[l])
    weight: Array  # 0 for ignored rows
    kept: Array
    loss_scale: Array
    grad_scale: Array
    lse_scale: Array
    p_scale: Array  # p_j (1 + |log p_j|): a rounding of log p_j is a relative error of p_j


@np.errstate(all="ignore")
def softmax_infogain(
    x: Array, labels: Array, H: Array, *, weight: Array | None = None, ignore_index: int = -100, z_loss: float = 0.0
) -> Rows:
    """loss = w (s_l z - sum_j H[l, j] (x_j - m) + z_loss lse^2), grad = w ((s_l + 2 z_loss lse) p - H[l])."""
    z_loss = EXTENDED(z_loss)
    kept = labels != ignore_index
    w = np.where(kept, 1 if weight is None else weight, 0).astype(EXTENDED)
    h = H[np.where(kept, labels, 0)]
    m = x.max(1, keepdims=True)
    shifted = x - m
    total = np.exp(shifted).sum(1, keepdims=True)
    z = np.log(total)
    p, log_p = np.exp(shifted) / total, shifted - z
    lse = np.where(np.isinf(m), m, m + z)[:, 0]
    s = h.sum(1)

    products = np.where(h == 0, 0, h * shifted)
    loss = s * z[:, 0] - products.sum(1) + z_loss * np.where(np.isfinite(lse), lse, 0) ** 2
    slope = s + 2 * z_loss * lse if z_loss else s
    grad = slope[:, None] * p - h
    z_scale = 1 + z  # a rounding of the total is an absolute error of z
    lse_scale = np.abs(m[:, 0]) + z_scale[:, 0]
    loss_scale = np.where(h == 0, 0, np.abs(h) * (np.abs(shifted) + z_scale)).sum(1) + abs(z_loss) * lse_scale**2
    p_scale = p * np.where(p > 0, 1 + np.abs(log_p), 0)
    slope_scale = np.abs(h).sum(1) + 2 * abs(z_loss) * lse_scale
    return Rows(
        loss=np.where(kept, w * loss, 0),
        grad=np.where(kept[:, None], w[:, None] * grad, 0),
        lse=lse,
        p=p,
        norm=np.where(kept, np.abs(w) * np.sqrt((grad**2).sum(1)), 0),
        log_p=log_p,
        slope=slope,
        weight=w,
        kept=kept,
        loss_scale=np.where(kept, np.abs(w) * loss_scale, 0),
        grad_scale=np.where(kept[:, None], np.abs(w)[:, None] * (slope_scale[:, None] * p_scale + np.abs(h)), 0),
        lse_scale=lse_scale,
        p_scale=p_scale,
    )


def plain_softmax_infogain(
    x: Tensor,
    labels: Tensor,
    H: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Rows:
    """The same rows as a user of PyTorch would write them, in float32 (float64 for float64): the yardstick of
    tolerance.py. The scales are left out."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, H = x.detach().to(dtype), H.to(dtype)
    kept = labels != ignore_index
    w = torch.where(kept, torch.ones((), dtype=dtype) if weight is None else weight.detach().to(dtype), 0)
    h = H[torch.where(kept, labels.long(), 0)]
    log_p, lse = torch.log_softmax(x, 1), torch.logsumexp(x, 1)
    p = log_p.exp()  # as the backward pass of log_softmax does
    loss = -torch.where(h == 0, 0, h * log_p).sum(1)
    slope = h.sum(1)
    if z_loss:
        loss, slope = loss + z_loss * lse**2, slope + 2 * z_loss * lse
    grad = slope[:, None] * p - h
    loss = torch.where(kept, w * loss, 0)
    norm = torch.where(kept, w.abs() * grad.norm(dim=1), 0)
    grad = torch.where(kept[:, None], w[:, None] * grad, 0)
    values = (loss, grad, lse, p, norm, log_p, slope, w, kept)
    return Rows(*(value.numpy(force=True) for value in values), *[None] * 4)


def denominator(labels: Tensor, axis: int, ignore_index: int, normalization: str | None) -> int:
    """What a mean divides by; labels in the shape that the caller gave them, axis the class axis of the logits."""
    outer = int(np.prod(labels.shape[:axis], dtype=np.int64))
    count = {None: (labels != ignore_index).sum().item(), "full": labels.numel(), "batch_size": outer, "none": 1}
    count["valid"] = count[None]
    return count[normalization] if normalization is None else max(count[normalization], 1)
