"""softmax_infogain in plain PyTorch.

Shapes: logits (O, C, I) with O outer positions, C classes and I inner positions; one row is logits[o, :, i]. Labels,
losses and every other per-row tensor have shape (O, I). Work is done in the accumulation type: float64 for float64
logits, float32 otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_labels(labels: Tensor, ignore_index: int, n_rows: int, wait_for_device: bool = False) -> None:
    """Raise IndexError at the first label outside [0, n_rows) that is not `ignore_index`. Unless it may wait for the
    device, on the CPU only: elsewhere such a row's loss is NaN and its gradient 0 instead."""
    if labels.device.type != "cpu" and not wait_for_device:
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= n_rows))
    if bool(wrong.any()):
        position = int(wrong.flatten().nonzero()[0])
        value = int(labels.flatten()[position])
        raise IndexError(f"labels: value {value} at position {position} is out of range for {n_rows} classes")


def infogain_rows(
    labels: Tensor,
    n_classes: int,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """H[labels], shape (O, C, I), for labels (O, I) that are all in range; linear in the parts that have a dtype.

    H = matrix + background + diag(diagonal), then a stored value (CSR: crow, col, values) takes the place of what is
    there. With no part at all H is the identity.
    """
    flat = labels.reshape(-1)
    if matrix is None:
        rows = torch.zeros(flat.shape[0], n_classes, dtype=dtype, device=labels.device)
    else:
        rows = matrix[flat].to(dtype)
    if background is not None:
        rows = rows + background.to(dtype)
    if diagonal is not None or (matrix is None and background is None and values is None):
        on_diagonal = flat.unsqueeze(1) == torch.arange(n_classes, device=labels.device)
        rows = rows + (on_diagonal if diagonal is None else on_diagonal * diagonal.to(dtype).expand(n_classes))
    if values is not None and len(values) > 0:
        first, count = crow[flat].unsqueeze(1), crow.diff()[flat].unsqueeze(1)
        within_row = torch.arange(int(crow.diff().max()), device=labels.device)
        stored = within_row < count  # (rows, largest number of stored entries in a row)
        entry = torch.where(stored, first + within_row, 0)
        column = torch.where(stored, col[entry], n_classes)  # one column more, for what is not stored
        rows = torch.nn.functional.pad(rows, (0, 1)).scatter(1, column, values[entry].to(dtype))[:, :n_classes]
    return rows.unflatten(0, labels.shape).movedim(-1, 1)


def log_softmax(x: Tensor) -> Tensor:
    """log_softmax over axis 1 of (O, C, I), computed over a last axis: over any other torch adds up one by one, which
    at 100,000 classes costs two digits of float32."""
    return torch.log_softmax(x.movedim(1, -1), -1).movedim(-1, 1)


class SoftmaxInfogainTerms:
    """What every function below starts from, in accumulation type. Differentiable in the logits and in H's parts."""

    def __init__(self, logits: Tensor, labels: Tensor, parts: tuple[Tensor | None, ...], ignore_index: int):
        x = logits.to(accumulation_dtype(logits.dtype))
        n_classes = logits.shape[1]
        self.n_rows = n_classes if parts[0] is None else parts[0].shape[0]
        in_range = (labels >= 0) & (labels < self.n_rows)
        self.kept = labels != ignore_index
        self.counted = self.kept & in_range
        self.labels = torch.where(in_range, labels, 0)
        self.rows = infogain_rows(self.labels, n_classes, *parts, dtype=x.dtype)  # (O, C, I)
        self.log_p = log_softmax(x)  # (O, C, I)
        self.lse = torch.logsumexp(x.movedim(1, -1), -1)  # (O, I)

    def slope(self, z_loss: float) -> Tensor:
        """The factor of p in the gradient of a row's loss: s_l + 2 z_loss lse, shape (O, I)."""
        return self.rows.sum(1) + 2 * z_loss * self.lse


def _in_the_layout_of(logits: Tensor, value: Tensor) -> Tensor:
    """value with the dtype and strides of the logits, as the kernels return it."""
    return torch.empty_like(logits).copy_(value)


def softmax_infogain(
    logits: Tensor,
    labels: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    z_loss: float,
    row_scale: Tensor | None,
    need_lse: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of every row, its log-sum-exp, the gradient for the upstream gradient `row_scale`, and the gradient's norm.

        loss[o, i] = -sum_j H[l, j] log_softmax(x)_j + z_loss * lse^2,   0 for an ignored row
        grad[o, :, i] = row_scale[o, i] * ((s_l + 2 z_loss lse) p - H[l])

    where H[l, j] == 0 contributes 0 even at a logit of -inf; norm[o, i] is the Euclidean norm of the gradient of
    loss[o, i]. What was not asked for (lse, norm, or the gradient, without `row_scale`) comes back with no element.
    """
    t = SoftmaxInfogainTerms(logits, labels, (matrix, background, diagonal, crow, col, values), ignore_index)
    check_labels(labels, ignore_index, t.n_rows)
    loss = -torch.where(t.rows == 0, 0, t.rows * t.log_p).sum(1) + z_loss * t.lse * t.lse
    loss = torch.where(t.counted, loss, torch.where(t.kept, torch.nan, 0))
    per_row = t.slope(z_loss).unsqueeze(1) * t.log_p.exp() - t.rows
    per_row = torch.where(t.counted.unsqueeze(1), per_row, 0)
    norm = per_row.norm(dim=1) if need_norm else loss.new_empty(0)
    lse = t.lse if need_lse else loss.new_empty(0)
    if row_scale is None:
        return loss, lse, logits.new_empty(0), norm
    grad = torch.where(t.counted.unsqueeze(1), row_scale.unsqueeze(1) * per_row, 0)
    return loss, lse, _in_the_layout_of(logits, grad), norm


def softmax_infogain_reduced(
    logits: Tensor,
    labels: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    z_loss: float,
    sample_weight: Tensor | None,
    divisor: float | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the losses of all rows, each times its sample_weight, over the divisor; 1 / divisor; the gradient of the
    first, without elements unless need_grad). divisor None: the number of labels that are not ignore_index."""
    dtype = accumulation_dtype(logits.dtype)
    if divisor is None:
        denominator = count_labels(labels, ignore_index, dtype)
    else:
        denominator = torch.full((), divisor, dtype=dtype, device=logits.device)
    scale = denominator.reciprocal()
    row_scale = scale.expand(labels.shape) if sample_weight is None else sample_weight * scale
    parts = (matrix, background, diagonal, crow, col, values)
    loss, _, grad, _ = softmax_infogain(
        logits, labels, *parts, ignore_index, z_loss, row_scale if need_grad else None, False, False
    )
    return (loss if sample_weight is None else loss * sample_weight).sum() / denominator, scale, grad


def softmax_infogain_backward(
    logits: Tensor,
    labels: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    z_loss: float,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
) -> Tensor:
    """Gradient of sum(grad_loss * loss) + sum(grad_lse * lse) with respect to the logits.

    grad = grad_loss * ((s_l + 2 z_loss lse) p - H[l]) + grad_lse * p; the first term is 0 for ignored rows.
    """
    t = SoftmaxInfogainTerms(logits, labels, (matrix, background, diagonal, crow, col, values), ignore_index)
    check_labels(labels, ignore_index, t.n_rows)
    p = t.log_p.exp()
    grad = grad_loss.unsqueeze(1) * (t.slope(z_loss).unsqueeze(1) * p - t.rows)
    grad = torch.where(t.counted.unsqueeze(1), grad, 0)
    if grad_lse is not None:
        grad = grad + grad_lse.unsqueeze(1) * p
    return _in_the_layout_of(logits, grad)


def softmax_infogain_backward_(
    grad: Tensor,
    row_scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    z_loss: float,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """Turn the gradient that the forward pass made for the upstream gradient `row_scale` into the one for `grad_loss`
    and `grad_lse`, in place. Rows for which the two agree already hold it."""
    if grad_lse is None and bool((grad_loss == row_scale).all()):
        return
    parts = (matrix, background, diagonal, crow, col, values)
    grad.copy_(softmax_infogain_backward(logits, labels, *parts, ignore_index, z_loss, grad_loss, grad_lse))


def softmax_infogain_double_backward(
    logits: Tensor,
    labels: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    z_loss: float,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    grad_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <grad_grad, softmax_infogain_backward(...)> with respect to logits, grad_loss and grad_lse."""
    parts = (matrix, background, diagonal, crow, col, values)
    grad_logits, *rest = second_derivative(logits, labels, *parts, ignore_index, z_loss, grad_loss, grad_lse, grad_grad)
    return _in_the_layout_of(logits, grad_logits), *rest


def second_derivative(
    logits: Tensor,
    labels: Tensor,
    matrix: Tensor | None,
    background: Tensor | None,
    diagonal: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    ignore_index: int,
    z_loss: float,
    grad_loss: Tensor,
    grad_lse: Tensor | None,
    grad_grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_infogain_double_backward` as an expression that can be differentiated and batched.

    With v = grad_grad, t = <p, v> and c = grad_loss (s_l + 2 z_loss lse) + grad_lse:
        d/dlogits    = c p (v - t) + 2 z_loss grad_loss t p
        d/dgrad_loss = (s_l + 2 z_loss lse) t - <H[l], v>
        d/dgrad_lse  = t
    """
    t = SoftmaxInfogainTerms(logits, labels, (matrix, background, diagonal, crow, col, values), ignore_index)
    p, v = t.log_p.exp(), grad_grad.to(t.log_p.dtype)
    upstream, slope = torch.where(t.counted, grad_loss, 0), t.slope(z_loss)
    mean_v = (p * v).sum(1)
    c = upstream * slope + (0 if grad_lse is None else grad_lse)
    inner = c.unsqueeze(1) * (v - mean_v.unsqueeze(1)) + (2 * z_loss * upstream * mean_v).unsqueeze(1)
    grad_grad_loss = torch.where(t.counted, slope * mean_v - (t.rows * v).sum(1), 0)
    result = p * inner
    if grad_lse is None:  # an ignored row stays 0 whatever is in it
        result = torch.where(t.counted.unsqueeze(1), result, 0)
    return result.to(logits.dtype), grad_grad_loss, mean_v


def softmax_infogain_backward_matrix(
    logits: Tensor, labels: Tensor, n_rows: int, ignore_index: int, grad_loss: Tensor
) -> Tensor:
    """Gradient of sum(grad_loss * loss) with respect to a dense H of shape (n_rows, C), in accumulation type:
    dH[l, j] = -sum of grad_loss * log p_j over the rows with label l."""
    x = logits.to(accumulation_dtype(logits.dtype))
    check_labels(labels, ignore_index, n_rows)
    counted = (labels != ignore_index) & (labels >= 0) & (labels < n_rows)
    contribution = -grad_loss.unsqueeze(1) * log_softmax(x)
    contribution = torch.where(counted.unsqueeze(1), contribution, 0).movedim(1, -1)
    result = x.new_zeros(n_rows, logits.shape[1])
    return result.index_add(0, torch.where(counted, labels, 0).flatten(), contribution.reshape(-1, logits.shape[1]))


def count_labels(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How many labels are not `ignore_index`: a tensor of this dtype without dimensions."""
    return (labels != ignore_index).sum().to(dtype)
