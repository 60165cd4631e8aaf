"""Softmax-with-infogain loss: the function, the module, and the checks of their arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lgd_kernels import ops
from lgd_kernels.arguments import FLOATING, check_bool, check_int, check_number, one_of
from lgd_kernels.autograd.softmax_infogain import softmax_infogain, softmax_infogain_mean, softmax_infogain_reduced
from lgd_kernels.infogain import Infogain, InfogainParts
from lgd_kernels.reference import accumulation_dtype
from lgd_kernels.watchers import is_eager

REDUCTIONS = ("none", "sum", "mean")
NORMALIZATIONS = ("full", "valid", "batch_size", "none")


class _Rows(NamedTuple):
    """A loss call, ready for the ops."""

    logits: Tensor  # as the caller gave them
    shape: tuple[int, int, int]  # (O, C, I), in which the ops take them
    labels: Tensor  # (O, I), int64
    parts: InfogainParts
    ignore_index: int
    z_loss: float
    sample_weight: Tensor | None  # (O, I), accumulation dtype


def _check_options(reduction: str, normalization: str | None, z_loss: float, ignore_index: int) -> None:
    one_of("reduction", reduction, REDUCTIONS)
    if normalization is not None:
        one_of("normalization", normalization, NORMALIZATIONS)
        if reduction != "mean":
            raise ValueError(f"normalization: {normalization!r} needs reduction='mean', got reduction={reduction!r}")
    check_number("z_loss", z_loss)
    check_int("ignore_index", ignore_index)


def _class_axis(logits: Tensor, axis: int) -> int:
    """axis as a non-negative number; 1 means 0 for unbatched logits."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits: dtype must be float64, float32, bfloat16 or float16, got {logits.dtype}")
    if logits.layout != torch.strided:
        raise TypeError(f"logits: expected a dense tensor, got layout {logits.layout}")
    check_int("axis", axis)
    if logits.dim() == 0:
        raise ValueError("logits: expected at least 1 dimension, got a scalar of shape ()")
    if logits.dim() == 1 and axis == 1:
        return 0
    if not -logits.dim() <= axis < logits.dim():
        raise ValueError(f"axis: {axis} is out of range for logits of shape {tuple(logits.shape)}")
    return axis % logits.dim()


def _check_per_row(name: str, tensor: Tensor, logits: Tensor, axis: int) -> None:
    """tensor has one element for every row of the logits, on their device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    expected = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name}: expected shape {expected} for logits of shape {tuple(logits.shape)} with class axis {axis}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != logits.device:
        raise ValueError(f"{name}: is on {tensor.device}, but logits are on {logits.device}")


def parts_for(H: Infogain | None, device: torch.device, num_classes: int, because: str) -> InfogainParts:
    """H's tensors, once they fit the number of classes; numbers move to the device."""
    if H is None:
        return InfogainParts()
    if not isinstance(H, Infogain):
        hint = "; wrap a matrix with lgd.Infogain.dense(matrix)" if isinstance(H, Tensor) else ""
        raise TypeError(f"H: expected an lgd.Infogain, got {type(H).__name__}{hint}")
    if H.num_classes is not None and H.num_classes != num_classes:
        raise ValueError(f"H: is for {H.num_classes} classes, but {because}")
    parts = [part if part is None or part.dim() else _number_on(device, part) for part in H.parts]
    for part in parts:
        if part is not None and part.device != device:
            raise ValueError(f"H: is on {part.device}, but logits are on {device}; move it with H.to({str(device)!r})")
    return InfogainParts(*parts)


def _number_on(device: torch.device, number: Tensor) -> Tensor:
    """A 0-dimensional tensor on a device. A constant of the CPU is written there, not copied: a copy would wait for the
    device, and a CUDA graph cannot have it."""
    is_constant_here = type(number) is Tensor and number.device.type == "cpu" and not number.requires_grad
    is_watched = not is_eager() or torch._C._len_torch_dispatch_stack() > 0
    if number.device == device or not is_constant_here or is_watched:
        return number.to(device)
    return torch.full((), number.item(), dtype=number.dtype, device=device)


def _canonical(
    logits: Tensor,
    labels: Tensor,
    H: Infogain | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    axis: int,
    z_loss: float,
) -> _Rows:
    """Check the arguments of a loss over integer labels and prepare them for the ops."""
    _check_per_row("labels", labels, logits, axis)
    if labels.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"labels: dtype must be int64 or uint8, got {labels.dtype}")
    if labels.dtype == torch.uint8:
        labels = labels.to(torch.int64)  # before they are compared with ignore_index: in uint8, -100 is 156
    shape = math.prod(logits.shape[:axis]), logits.shape[axis], math.prod(logits.shape[axis + 1 :])
    per_row, weight = (shape[0], shape[2]), None
    if sample_weight is not None:
        _check_per_row("sample_weight", sample_weight, logits, axis)
        if sample_weight.dtype not in FLOATING:
            raise TypeError(f"sample_weight: dtype must be floating, got {sample_weight.dtype}")
        counts = labels != ignore_index  # what an ignored row weighs is nobody's business: it may be NaN
        weight = torch.where(counts, sample_weight.to(accumulation_dtype(logits.dtype)), 0)
        weight = weight.reshape(per_row)
    because = f"logits of shape {tuple(logits.shape)} have {shape[1]} along axis {axis}"
    parts = parts_for(H, logits.device, shape[1], because)
    return _Rows(logits, shape, labels.reshape(per_row), parts, ignore_index, z_loss, weight)


def _denominator(rows: _Rows, reduction: str, normalization: str | None) -> Tensor | float | None:
    """What the sum of the losses is divided by; None for the number of rows that are not ignored."""
    if reduction != "mean":
        return 1.0
    outer, _, inner = rows.shape
    if normalization == "none":
        return 1.0
    if normalization == "batch_size":
        return float(max(outer, 1))
    if normalization == "full":
        return float(max(outer * inner, 1))
    return None if normalization is None else _count(rows).clamp_min(1)


def _count(rows: _Rows) -> Tensor:
    """The number of rows that are not ignored, in accumulation dtype."""
    return ops.count_labels(rows.labels, rows.ignore_index, accumulation_dtype(rows.logits.dtype))


def _expected_upstream(rows: _Rows, reduction: str, denominator: Tensor | float) -> Tensor | None:
    """The upstream gradient (O, I) that each row's loss will see if the result's own is 1; None where nobody can know
    it, or where the tracing of a compiler or a transform makes a gradient in advance a waste."""
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if reduction == "none" or transformed or not (rows.logits.requires_grad and torch.is_grad_enabled()):
        return None
    if isinstance(denominator, Tensor):
        scale = denominator.reciprocal()
    else:
        scale = torch.full(
            (), 1.0 / denominator, dtype=accumulation_dtype(rows.logits.dtype), device=rows.logits.device
        )
    if rows.sample_weight is None:
        return scale.expand(rows.labels.shape)
    return rows.sample_weight.detach() * scale


def _reduced_loss(rows: _Rows, reduction: str, denominator: Tensor | float | None) -> Tensor:
    """The loss, reduced or (O, I), in accumulation dtype: in one op where there is one for it."""
    weight = rows.sample_weight
    needs_more = reduction == "none" or isinstance(denominator, Tensor) or (weight is not None and weight.requires_grad)
    if needs_more or not is_eager():
        return _loss_lse_and_norm(rows, reduction, denominator)[0]
    need_grad = rows.logits.requires_grad and torch.is_grad_enabled()
    return softmax_infogain_reduced(
        rows.logits,
        rows.labels,
        *rows.parts,
        rows.ignore_index,
        rows.z_loss,
        weight,
        denominator,
        need_grad,
        rows.shape,
    )


def _loss_lse_and_norm(
    rows: _Rows, reduction: str, denominator: Tensor | float | None, need_lse: bool = False, need_norm: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, reduced or (O, I); log-sum-exp (O, I) or empty; gradient norm likewise), in accumulation dtype."""
    weight = rows.sample_weight
    denominator = _count(rows) if denominator is None else denominator
    row_scale = _expected_upstream(rows, reduction, denominator)
    logits = rows.logits.reshape(rows.shape)
    loss, lse, _, norm = softmax_infogain(
        logits, rows.labels, *rows.parts, rows.ignore_index, rows.z_loss, row_scale, need_lse, need_norm
    )
    if weight is not None:
        loss = loss * weight
        norm = norm * weight.detach().abs() if need_norm else norm
    return loss if reduction == "none" else loss.sum() / denominator, lse, norm


def _result_dtype(logits: Tensor) -> torch.dtype:
    """The logits' dtype; float32 under autocast, as for torch.nn.functional.cross_entropy."""
    device = logits.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # which raises for meta
    return torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype


def _as_result(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as the caller of a loss for these logits and labels gets it; one of every row (O, I) in their shape."""
    loss = loss.reshape(labels.shape) if loss.dim() else loss
    return loss if loss.dtype == logits.dtype else loss.to(_result_dtype(logits))


_USUAL = ("mean", None, 1, 0.0, False, False, False, False)  # the defaults of softmax_infogain_loss
_TYPES_OF_USUAL = tuple(map(type, _USUAL))


def _usual_loss(logits: Tensor, labels: Tensor, H: Infogain | None, ignore_index: int) -> Tensor | None:
    """The mean loss with all other options left at their defaults; None if it needs the long way, or is wrong."""
    is_usual = (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and (H is None or isinstance(H, Infogain))
        and type(ignore_index) is int
        and abs(ignore_index) < 2**62
    )
    if not is_usual:
        return None
    parts, num_classes = (InfogainParts(), None) if H is None else (H.parts, H.num_classes)
    return softmax_infogain_mean(logits, labels, parts, num_classes, ignore_index)


def softmax_infogain_loss(
    logits: Tensor,
    labels: Tensor,
    H: Infogain | None = None,
    *,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalization: str | None = None,
    axis: int = 1,
    z_loss: float = 0.0,
    return_probabilities: bool = False,
    return_lse: bool = False,
    return_grad_norm: bool = False,
    check_labels: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax-with-infogain loss from raw logits: cross entropy in which H says how bad each mistake is.

    For a row x of logits with label l, p = softmax(x), s_l = sum_j H[l, j] and sample weight w:

        loss     = w * (-sum_j H[l, j] log p_j + z_loss * logsumexp(x)^2)      where 0 * inf counts as 0
        dloss/dx = w * ((s_l + 2 z_loss logsumexp(x)) p - H[l])

    With H = None (the identity) this is `torch.nn.functional.cross_entropy`. The infogain loss is Caffe's
    InfogainLoss; z_loss is the log-normalizer penalty of PaLM (arXiv:2204.02311). Differentiable, twice and more, in
    logits, sample_weight and the tensors of H. Inputs are never modified.

    Args:
        logits: (N, C, d1, ...), or (C,) unbatched; float64, float32, bfloat16 or float16; any strides. Sums are
            accumulated in float64 for float64 and in float32 otherwise.
        labels: the shape of the logits without the class axis; int64 or uint8.
        H: the label-similarity matrix, an `Infogain` for C classes.
        sample_weight: the shape of labels; floating; may require grad. The mean does not divide by the weights.
        ignore_index: rows with this label have loss 0 and gradient 0, and do not count in the mean.
        reduction: "none" | "sum" | "mean".
        normalization: what the mean divides by. None: the number of rows that are not ignored, NaN if there are none,
            as in PyTorch. "valid": the same, but at least 1. "full": all rows. "batch_size": the product of the axes
            before the class axis. "none": 1. Needs reduction="mean".
        axis: the class axis; 1 means 0 for unbatched logits.
        z_loss: coefficient of the squared log-sum-exp.
        return_probabilities: also return softmax(logits), in the shape of the logits.
        return_lse: also return the log-sum-exp of every row, in the shape of labels, in the accumulation dtype.
        return_grad_norm: also return the Euclidean norm of the gradient of every row's loss (before the reduction), in
            the shape of labels; it carries no gradient itself.
        check_labels: wait for the labels on a device other than the CPU, and raise for one that is out of range. For
            all calls: LGD_CHECK_LABELS=1 in the environment. On the CPU labels are always checked.

    Returns:
        The loss, in the logits' dtype (float32 under autocast): a scalar, or the shape of labels for
        reduction="none". With any return_ option a tuple: the loss, then what was asked for, in the order above.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or name.
        IndexError: a label outside [0, C) that is not ignore_index, on the CPU or with check_labels. Otherwise nothing
            waits for the device: such a row's loss is NaN and its gradient 0.
    """
    options = (
        *(reduction, normalization, axis, z_loss),
        *(return_probabilities, return_lse, return_grad_norm, check_labels),
    )
    if sample_weight is None and tuple(map(type, options)) == _TYPES_OF_USUAL and options == _USUAL:
        loss = _usual_loss(logits, labels, H, ignore_index)
        if loss is not None:
            return _as_result(loss, logits, labels)
    axis = _class_axis(logits, axis)
    _check_options(reduction, normalization, z_loss, ignore_index)
    check_bool("return_probabilities", return_probabilities)
    check_bool("return_lse", return_lse)
    check_bool("return_grad_norm", return_grad_norm)
    check_bool("check_labels", check_labels)
    rows = _canonical(logits, labels, H, sample_weight, ignore_index, axis, z_loss)
    if check_labels and logits.device.type != "cpu":
        ops.check_labels(rows.labels, ignore_index, rows.shape[1])
    denominator = _denominator(rows, reduction, normalization)
    if not (return_probabilities or return_lse or return_grad_norm):
        return _as_result(_reduced_loss(rows, reduction, denominator), logits, labels)
    loss, lse, norm = _loss_lse_and_norm(rows, reduction, denominator, return_lse, return_grad_norm)
    outputs = [_as_result(loss, logits, labels)]
    if return_probabilities:
        outputs.append(torch.softmax(logits, axis, dtype=_result_dtype(logits)))
    if return_lse:
        outputs.append(lse.reshape(labels.shape))
    if return_grad_norm:
        outputs.append(norm.reshape(labels.shape))
    return tuple(outputs)


class SoftmaxInfogainLoss(nn.Module):
    """`softmax_infogain_loss` as a module; with H=None a drop-in for `torch.nn.CrossEntropyLoss`.

    Args:
        H: an `Infogain`. Its tensors become buffers of the module (parameters where they are `nn.Parameter`s), so that
            `.to(...)`, `state_dict()` and `parameters()` see them.
        weight: (C,) class weights as in `nn.CrossEntropyLoss`, whose mean divides by the sum of the weights of the
            valid labels. Not together with H.
        label_smoothing: in [0, 1], as in `nn.CrossEntropyLoss`. Not together with H.
        ignore_index, reduction, normalization, axis, z_loss: as in `softmax_infogain_loss`.

    Without H the labels may also be class probabilities: floating, in the shape of the logits (no ignored rows then;
    the mean divides by the number of rows).

    Raises ValueError for H together with weight or label_smoothing: they are kinds of H (`Infogain.diagonal`,
    `Infogain.label_smoothing`).
    """

    def __init__(
        self,
        H: Infogain | None = None,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalization: str | None = None,
        axis: int = 1,
        z_loss: float = 0.0,
    ):
        super().__init__()
        if H is not None and not isinstance(H, Infogain):
            raise TypeError(f"H: expected an lgd.Infogain or None, got {type(H).__name__}")
        if H is not None and (weight is not None or label_smoothing != 0):
            raise ValueError(
                f"H={H!r} together with weight or label_smoothing: those are kinds of H; "
                "use Infogain.diagonal or Infogain.label_smoothing, or build the product as Infogain.dense"
            )
        check_number("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing: must be between 0 and 1, got {label_smoothing}")
        check_int("axis", axis)
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a torch.Tensor, got {type(weight).__name__}")
        if weight is not None and (weight.dim() != 1 or weight.dtype not in FLOATING):
            raise ValueError(
                f"weight: expected a floating tensor of shape (C,), got {weight.dtype} {tuple(weight.shape)}"
            )
        _check_options(reduction, normalization, z_loss, ignore_index)
        self.ignore_index, self.reduction, self.normalization = ignore_index, reduction, normalization
        self.axis, self.z_loss, self.label_smoothing = axis, z_loss, label_smoothing
        self.register_buffer("weight", weight)
        self._kind = None if H is None else (H.kind, H.num_classes)
        for name, part in InfogainParts()._asdict().items() if H is None else H.parts._asdict().items():
            register = self.register_parameter if isinstance(part, nn.Parameter) else self.register_buffer
            register(f"H_{name}", part)

    @property
    def H(self) -> Infogain | None:
        """The similarity matrix with the module's present tensors."""
        if self._kind is None:
            return None
        return Infogain(*self._kind, InfogainParts(*(getattr(self, f"H_{name}") for name in InfogainParts._fields)))

    def forward(self, logits: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss; see `softmax_infogain_loss` for shapes and errors."""
        if isinstance(labels, Tensor) and labels.is_floating_point():
            return self._loss_of_probabilities(logits, labels, sample_weight)
        if self.weight is None:
            return softmax_infogain_loss(
                logits,
                labels,
                self._smoothing(logits) if self._kind is None else self.H,
                sample_weight=sample_weight,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                normalization=self.normalization,
                axis=self.axis,
                z_loss=self.z_loss,
            )
        axis = _class_axis(logits, self.axis)
        H = self._weighted(logits, axis)
        rows = _canonical(logits, labels, H, sample_weight, self.ignore_index, axis, self.z_loss)
        if self.reduction == "mean" and self.normalization is None:
            denominator = self._sum_of_weights(rows)
        else:
            denominator = _denominator(rows, self.reduction, self.normalization)
        return _as_result(_reduced_loss(rows, self.reduction, denominator), logits, labels)

    def _smoothing(self, logits: Tensor) -> Infogain | None:
        if self.label_smoothing == 0:
            return None
        axis = _class_axis(logits, self.axis)
        epsilon = torch.tensor(self.label_smoothing, dtype=torch.float64, device="cpu")  # a GPU would be waited for
        return Infogain.label_smoothing(epsilon, logits.shape[axis])

    def _weighted(self, logits: Tensor, axis: int) -> Infogain:
        """H[l, j] = (1 - e) w_l [l = j] + e w_j / C, as PyTorch weights a smoothed label."""
        num_classes, epsilon = logits.shape[axis], self.label_smoothing
        self._check_weight(logits, axis)
        if epsilon == 0:
            return Infogain("diagonal", num_classes, InfogainParts(diagonal=self.weight))
        every_row = (epsilon / num_classes * self.weight).expand(num_classes, num_classes)  # one row, stride 0
        return Infogain("dense", num_classes, InfogainParts(matrix=every_row, diagonal=(1 - epsilon) * self.weight))

    def _check_weight(self, logits: Tensor, axis: int) -> None:
        if len(self.weight) != logits.shape[axis]:
            raise ValueError(
                f"weight: has {len(self.weight)} entries, but logits of shape {tuple(logits.shape)} have "
                f"{logits.shape[axis]} classes along axis {axis}"
            )
        if self.weight.device != logits.device:
            raise ValueError(f"weight: is on {self.weight.device}, but logits are on {logits.device}")

    def _sum_of_weights(self, rows: _Rows) -> Tensor:
        kept = rows.labels != rows.ignore_index
        in_range = (rows.labels >= 0) & (rows.labels < len(self.weight))
        weights = self.weight.to(accumulation_dtype(rows.logits.dtype))[torch.where(in_range, rows.labels, 0)]
        return torch.where(kept, weights, 0).sum()

    def _loss_of_probabilities(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None) -> Tensor:
        """Class-probability targets: every row has a row of H of its own."""
        if self._kind is not None:
            raise TypeError(
                f"labels: class probabilities ({target.dtype}) cannot be combined with H={self.H!r}; with an H, labels "
                "are int64 or uint8"
            )
        axis = _class_axis(logits, self.axis)
        if target.shape != logits.shape:
            raise ValueError(
                f"labels: class probabilities must have the logits' shape {tuple(logits.shape)}, "
                f"got {tuple(target.shape)}"
            )
        if target.device != logits.device:
            raise ValueError(f"labels: is on {target.device}, but logits are on {logits.device}")
        if self.ignore_index >= 0:
            raise ValueError(f"ignore_index: {self.ignore_index} has no meaning for class-probability labels")
        num_classes = logits.shape[axis]
        target = target.movedim(axis, -1)
        if self.label_smoothing > 0:
            target = target * (1 - self.label_smoothing) + self.label_smoothing / num_classes
        if self.weight is not None:
            self._check_weight(logits, axis)
            target = target * self.weight
        target = target.reshape(-1, num_classes)  # (O * I, C)
        positions = torch.arange(len(target), device=logits.device).reshape(
            [size for i, size in enumerate(logits.shape) if i != axis]
        )
        rows = _canonical(logits, positions, None, sample_weight, -1, axis, self.z_loss)
        rows = rows._replace(parts=InfogainParts(matrix=target))
        denominator = _denominator(rows, self.reduction, self.normalization or "full")
        return _as_result(_reduced_loss(rows, self.reduction, denominator), logits, positions)

    def extra_repr(self) -> str:
        options = f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        if self._kind is not None:
            return f"{self.H!r}, {options}"
        return f"weight={None if self.weight is None else tuple(self.weight.shape)}, " + (
            f"label_smoothing={self.label_smoothing}, {options}"
        )
