"""Autograd of softmax_infogain: first, second and higher derivatives, forward mode, vmap.

`SoftmaxInfogain` differentiates the loss of every row, `SoftmaxInfogainReduced` their sum; `SoftmaxInfogainBackward` is
the gradient as a function of its own, so that it can be differentiated again. Beyond the second derivative everything
is plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lgd_kernels import backends, ops, reference
from lgd_kernels.autograd.apply import apply
from lgd_kernels.watchers import is_eager, is_overridden

_N_PARTS = 6  # matrix, background, diagonal, crow, col, values


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running was asked to retain its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _in_shape(gradient: Tensor, shape: torch.Size) -> Tensor:
    """The gradient in this shape, and not as a view made in no_grad mode: those may not be changed in place together
    with tensors that require grad."""
    return gradient.reshape(shape) if torch.is_grad_enabled() else torch.ops.aten._unsafe_view(gradient, shape)


def _may_give_away(*upstream: Tensor | None) -> bool:
    """Whether nobody but this backward pass, and it only once, reads what the forward pass saved for it."""
    return not (_graph_is_kept() or any(map(_is_batched, upstream)))


def _is_batched(tensor: Tensor | None) -> bool:
    """Whether the backward pass itself runs under a vmap, as for `torch.autograd.grad(..., is_grads_batched=True)`."""
    functorch = torch._C._functorch
    return tensor is not None and (functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def _tangent_of_rows(terms, parts, tangents, n_classes: int) -> Tensor | None:
    """The change of H[labels] when H's parts change by `tangents`; None when none of them does."""
    if all(tangent is None for tangent in tangents):
        return None
    moved = tuple(
        part if part is None or not part.is_floating_point() else torch.zeros_like(part) if tangent is None else tangent
        for part, tangent in zip(parts, tangents, strict=True)
    )
    return reference.infogain_rows(terms.labels, n_classes, *moved, dtype=terms.rows.dtype)


def _gradients_of_parts(grad_rows: Tensor, terms, parts, needed) -> list[Tensor | None]:
    """Pull the gradient of H[labels] (O, C, I) back to those parts of H that need one. Sums are made in the dtype of
    grad_rows, whatever that of the part."""
    chosen = [i for i in range(_N_PARTS) if needed[i]]

    def rows_of(*changed: Tensor) -> Tensor:
        new = list(parts)
        for i, part in zip(chosen, changed, strict=True):
            new[i] = part
        return reference.infogain_rows(terms.labels, grad_rows.shape[1], *new, dtype=grad_rows.dtype)

    _, pull_back = torch.func.vjp(rows_of, *(parts[i].to(grad_rows.dtype) for i in chosen))
    gradients: list[Tensor | None] = [None] * _N_PARTS
    for i, gradient in zip(chosen, pull_back(grad_rows), strict=True):
        gradients[i] = gradient.to(parts[i].dtype)
    return gradients


def _gradients(
    rows: tuple, needed, grad_loss: Tensor, grad_lse: Tensor | None, made: tuple[Tensor, Tensor] | None
) -> tuple[Tensor | None, ...]:
    """The gradients of logits, labels (None) and H's parts for the upstream gradients of every row's loss and lse.

    rows: what every op starts with. needed: for which of those, as in `needs_input_grad`. made: (the gradient of the
    logits that the forward pass made, the grad_loss for which it did), for this pass to change in place and give away.
    """
    logits, labels, *parts, ignore_index, _ = rows
    needs_parts = needed[2 : 2 + _N_PARTS]
    differentiable = torch.is_grad_enabled() or forward_ad._current_level >= 0

    grad_logits = None
    if needed[0]:
        if differentiable:
            grad_logits = softmax_infogain_backward(*rows, grad_loss, grad_lse)
        elif made is None:
            grad_logits = ops.softmax_infogain_backward(*rows, grad_loss, grad_lse)
        else:
            ops.softmax_infogain_backward_(*made, *rows, grad_loss, grad_lse)
            grad_logits = made[0]

    grad_parts = [None] * _N_PARTS
    if any(needs_parts):
        only_matrix = not any(needs_parts[1:]) and parts[5] is None  # stored values hide some of it
        if only_matrix and not differentiable:
            grad_parts[0] = ops.softmax_infogain_backward_matrix(
                logits, labels, parts[0].shape[0], ignore_index, grad_loss
            ).to(parts[0].dtype)
        else:
            terms = reference.SoftmaxInfogainTerms(logits, labels, tuple(parts), ignore_index)
            grad_rows = torch.where(terms.counted, -grad_loss, 0).unsqueeze(1) * terms.log_p
            grad_parts = _gradients_of_parts(grad_rows, terms, parts, needs_parts)
    return grad_logits, None, *grad_parts


class SoftmaxInfogain(torch.autograd.Function):
    """(loss, lse, gradient made in advance, gradient norm) of every row; differentiable in logits and H's parts.

    With `row_scale`, the upstream gradient that is expected for the loss, the forward pass writes the gradient of the
    logits at once, while the row is in cache, and the backward pass finds it done.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits,
        labels,
        matrix,
        background,
        diagonal,
        crow,
        col,
        values,
        ignore_index,
        z_loss,
        row_scale,
        need_lse,
        need_norm,
    ):
        parts = (matrix, background, diagonal, crow, col, values)
        return ops.softmax_infogain(logits, labels, *parts, ignore_index, z_loss, row_scale, need_lse, need_norm)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, *parts, ctx.ignore_index, ctx.z_loss, row_scale, ctx.need_lse, _ = inputs
        _, lse, grad, norm = output
        ctx.mark_non_differentiable(grad, norm, *(() if ctx.need_lse else (lse,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_forward(logits, labels, *parts, None, None)  # as many as below, and before it: torch's vmap
        ctx.save_for_backward(logits, labels, *parts, row_scale, grad)

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, _grad, _norm):
        logits, labels, *parts, row_scale, grad = ctx.saved_tensors
        n_inputs = 2 + _N_PARTS + 5
        if not ctx.need_lse:  # under torch.compile it is zeros without an element, not None
            grad_lse = None
        if grad_loss is None and grad_lse is None:
            return (None,) * n_inputs
        if grad_loss is None:
            grad_loss = torch.zeros_like(grad_lse)
        rows = (logits, labels, *parts, ctx.ignore_index, ctx.z_loss)
        made = (grad, row_scale) if row_scale is not None and _may_give_away(grad_loss, grad_lse) else None
        return *_gradients(rows, ctx.needs_input_grad, grad_loss, grad_lse, made), None, None, None, None, None


class SoftmaxInfogainReduced(torch.autograd.Function):
    """The sum of all rows' losses over a divisor, in one op: eager code saves the calls for the count, the upstream
    gradient, the sum, the division, a reshape, and their backward nodes, at (8192, 1000) 0.2 ms. For what `is_eager`
    allows. Takes the logits as they are, and the shape (O, C, I) for the op.

    The compiled extension has the same in C++ (csrc/torch/softmax_infogain_autograd.cpp), for calls that nobody
    overrides. Both save the same tensors: with `torch.utils.checkpoint` one may compute what the other did before."""

    @staticmethod
    def forward(ctx, logits, labels, *rest):
        *parts, ignore_index, z_loss, sample_weight, _, ctx.made_in_advance, shape = rest
        ctx.options = ignore_index, z_loss, shape
        loss, scale, grad = ops.softmax_infogain_reduced(logits.reshape(shape), labels, *rest[:-1])
        grad = _in_shape(grad, logits.shape) if ctx.made_in_advance else grad
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, *parts, sample_weight, scale, grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        needed, saved = ctx.needs_input_grad, ctx.saved_tensors
        if grad_loss is None:
            return (None,) * len(needed)
        gradients = _backward_of_reduced(grad_loss, saved, *ctx.options, ctx.made_in_advance, needed)
        return *gradients, *[None] * (len(needed) - len(gradients))


_ONLY_LOGITS = (True, *[False] * (1 + _N_PARTS))


def _backward_of_reduced(
    grad_loss: Tensor, saved, ignore_index: int, z_loss: float, shape, made_in_advance=True, needed=_ONLY_LOGITS
) -> tuple[Tensor | None, ...]:
    """The gradients of logits, labels (None) and H's parts. The node in C++ calls it with the first five arguments."""
    logits, labels, *parts, sample_weight, scale, grad = saved
    rows = (logits.reshape(shape), labels, *parts, ignore_index, z_loss)
    row_scale = scale.expand(labels.shape) if sample_weight is None else sample_weight * scale
    made = (grad.reshape(shape), row_scale) if made_in_advance and _may_give_away(grad_loss) else None
    grad_logits, *others = _gradients(rows, needed, grad_loss * row_scale, None, made)
    return None if grad_logits is None else _in_shape(grad_logits, logits.shape), *others


if backends.extension is not None:
    backends.extension.set_backward_of_reduced(_backward_of_reduced)


class SoftmaxInfogainBackward(torch.autograd.Function):
    """The gradient of the logits as a function of logits, H's parts and the upstream gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits, labels, matrix, background, diagonal, crow, col, values, ignore_index, z_loss, grad_loss, grad_lse
    ):
        parts = (matrix, background, diagonal, crow, col, values)
        return ops.softmax_infogain_backward(logits, labels, *parts, ignore_index, z_loss, grad_loss, grad_lse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, labels, *parts, ctx.ignore_index, ctx.z_loss, grad_loss, grad_lse = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, *parts, grad_loss, grad_lse)
        ctx.save_for_forward(logits, labels, *parts, grad_loss, grad_lse)

    @staticmethod
    def backward(ctx, grad_grad):
        if grad_grad is None:
            return (None,) * (2 + _N_PARTS + 4)
        logits, labels, *parts, grad_loss, grad_lse = ctx.saved_tensors
        rows = (logits, labels, *parts, ctx.ignore_index, ctx.z_loss)
        needs_parts = ctx.needs_input_grad[2 : 2 + _N_PARTS]
        double_backward = (
            reference.second_derivative if torch.is_grad_enabled() else ops.softmax_infogain_double_backward
        )
        grad_logits, grad_grad_loss, grad_grad_lse = double_backward(*rows, grad_loss, grad_lse, grad_grad)

        grad_parts = [None] * _N_PARTS
        if any(needs_parts):  # <v, grad> = grad_loss * (s_l <p, v> - <H[l], v>) + what does not depend on H
            terms = reference.SoftmaxInfogainTerms(logits, labels, tuple(parts), ctx.ignore_index)
            v = grad_grad.to(terms.lse.dtype)
            upstream = torch.where(terms.counted, grad_loss, 0).unsqueeze(1)
            grad_rows = upstream * ((terms.log_p.exp() * v).sum(1, keepdim=True) - v)
            grad_parts = _gradients_of_parts(grad_rows, terms, parts, needs_parts)
        return (
            grad_logits,
            None,
            *grad_parts,
            None,
            None,
            grad_grad_loss if ctx.needs_input_grad[-2] else None,
            grad_grad_lse if ctx.needs_input_grad[-1] else None,
        )


class _SoftmaxInfogainForwardMode(SoftmaxInfogain):
    """With the rule for forward-mode differentiation, which torch.compile cannot trace (torch 2.13)."""

    @staticmethod
    def jvp(ctx, logits_t, _labels, *rest):
        logits, labels, *parts, _, _ = ctx.saved_tensors
        terms = reference.SoftmaxInfogainTerms(logits, labels, tuple(parts), ctx.ignore_index)
        loss_t, lse_t = torch.zeros_like(terms.lse), torch.zeros_like(terms.lse)
        if logits_t is not None:
            x_t, p = logits_t.to(terms.lse.dtype), terms.log_p.exp()
            lse_t = (p * x_t).sum(1)
            loss_t = terms.slope(ctx.z_loss) * lse_t - (terms.rows * x_t).sum(1)
        rows_t = _tangent_of_rows(terms, parts, rest[:_N_PARTS], logits.shape[1])
        if rows_t is not None:
            loss_t = loss_t - (rows_t * terms.log_p).sum(1)
        return torch.where(terms.counted, loss_t, 0), lse_t if ctx.need_lse else None, None, None


class _SoftmaxInfogainBackwardForwardMode(SoftmaxInfogainBackward):
    """With the rule for forward-mode differentiation, which torch.compile cannot trace (torch 2.13)."""

    @staticmethod
    def jvp(ctx, logits_t, _labels, *rest):
        logits, labels, *parts, grad_loss, grad_lse = ctx.saved_tensors
        *parts_t, _, _, grad_loss_t, grad_lse_t = rest
        terms = reference.SoftmaxInfogainTerms(logits, labels, tuple(parts), ctx.ignore_index)
        p, slope = terms.log_p.exp(), terms.slope(ctx.z_loss)
        upstream = torch.where(terms.counted, grad_loss, 0)
        result = torch.zeros_like(p)
        if logits_t is not None:  # the Jacobian is symmetric: the double backward applied to the tangent
            rows = (logits, labels, *parts, ctx.ignore_index, ctx.z_loss)
            changed, _, _ = reference.second_derivative(*rows, grad_loss, grad_lse, logits_t)
            result = result + changed
        if grad_loss_t is not None:
            change = torch.where(terms.counted, grad_loss_t, 0).unsqueeze(1)
            result = result + change * (slope.unsqueeze(1) * p - terms.rows)
        if grad_lse_t is not None:
            result = result + grad_lse_t.unsqueeze(1) * p
        rows_t = _tangent_of_rows(terms, parts, parts_t, logits.shape[1])
        if rows_t is not None:
            result = result + upstream.unsqueeze(1) * (rows_t.sum(1, keepdim=True) * p - rows_t)
        return result.to(logits.dtype)


def softmax_infogain(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.softmax_infogain`, differentiable."""
    return apply(SoftmaxInfogain, _SoftmaxInfogainForwardMode, args)


def softmax_infogain_reduced(*args) -> Tensor:
    """The first result of `ops.softmax_infogain_reduced`, differentiable in logits and H's parts."""
    logits, labels, *parts, _, _, sample_weight, _, _, _ = args
    kernels = backends.implementation("softmax_infogain_reduced", logits.device.type)
    if kernels is backends.extension and not is_overridden((logits, labels, *parts, sample_weight)):
        loss = kernels.softmax_infogain_reduced_with_node(*args)
        if loss is not None:
            return loss
    return SoftmaxInfogainReduced.apply(*args)


def softmax_infogain_mean(
    logits: Tensor, labels: Tensor, parts: tuple[Tensor | None, ...], num_classes: int | None, ignore_index: int
) -> Tensor | None:
    """The mean loss of logits (N, C) and labels (N,), checks included, by the compiled extension alone: 0.1 ms less
    than by way of Python where other code has had the caches since the last call. None for what is not that, is
    watched or overridden, or is wrong."""
    if not is_eager() or is_overridden((logits, labels, *parts)):
        return None
    kernels = backends.implementation("softmax_infogain_mean", logits.device.type)
    if kernels is not backends.extension:
        return None
    return kernels.softmax_infogain_mean(logits, labels, *parts, num_classes, ignore_index)


def softmax_infogain_backward(*args) -> Tensor:
    """`ops.softmax_infogain_backward`, differentiable."""
    return apply(SoftmaxInfogainBackward, _SoftmaxInfogainBackwardForwardMode, args)
