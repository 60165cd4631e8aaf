"""softmax_infogain in Triton: loss, gradient, second derivative and the gradient of H, for rows of raw logits.

The functions at the end have the signatures and the results of `reference/softmax_infogain.py`, which says what they
compute. A program has one row or several, in tiles (BLOCK_R, BLOCK_C). A row whose classes fit one tile (`WHOLE`) is
read once and stays in registers from its maximum to its gradient; a longer one is read twice, first for its sums, with
those of the tiles before rescaled whenever the maximum rises, then for its gradient. Sums are made in an order that
depends on the number of classes alone, without atomics.

H is a base, which every tile meets (nothing, a constant, or a row of a dense matrix), and entries in the base's place:
one on the diagonal, or stored values. A diagonal on top of a dense matrix belongs to the base.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    INT32_MAX,
    add,
    alignment,
    architecture_of,
    extent,
    launch,
    multiple,
    per_row,
    rows,
    rows_at,
    tiles_for,
    to_classes,
)

BLOCK_E = tl.constexpr(16)  # stored values of a row that are seen at once
STAGES = tl.constexpr(3)  # of a row read twice: two tiles on their way to shared memory while one is worked on


class Similarity(NamedTuple):
    """H as the kernels take it; strides count elements."""

    has_base: tl.constexpr  # whether H is more than its entries
    has_entry: tl.constexpr  # whether each row has one entry, on the diagonal; without any part H is the identity
    matrix_align: tl.constexpr
    matrix: Tensor | None
    matrix_row: int
    matrix_class: int
    background: Tensor | None
    diagonal: Tensor | None
    diagonal_stride: int
    crow: Tensor | None
    col: Tensor | None
    stored: Tensor | None  # not `values`: Triton's tuples have that already


# ---------------------------------------------------------------------------------------------------------------------
# H
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def background_of(h, ACC: tl.constexpr):
    """The base where it is a constant."""
    if h.background is not None:
        return tl.load(h.background).to(ACC)
    else:
        return tl.full((), 0, ACC)


@triton.jit
def diagonal_of(h, label, counted, ACC: tl.constexpr):
    """What the diagonal adds to H[l, l], (BLOCK_R,)."""
    if h.diagonal is not None:
        return tl.load(h.diagonal + label * h.diagonal_stride, mask=counted, other=0).to(ACC)
    else:
        return tl.full(label.shape, 1, ACC)


@triton.jit
def stored_range(h, label, counted):
    """Where the stored values of the rows begin, and how many there are, (BLOCK_R,)."""
    begin = tl.load(h.crow + label, mask=counted, other=0)
    count = tl.load(h.crow + label + 1, mask=counted, other=0) - begin
    return begin.to(label.dtype), count.to(label.dtype)


@triton.jit
def stored_values(h, begin, count, first, ACC: tl.constexpr):
    """BLOCK_E stored values of each row from the `first` on, (BLOCK_R, BLOCK_E): (which exist, class, value)."""
    position = first + tl.arange(0, BLOCK_E)
    exists = position[None, :] < count[:, None]
    at = begin[:, None] + position[None, :]
    column = tl.load(h.col + at, mask=exists, other=0).to(begin.dtype)
    return exists, column, tl.load(h.stored + at, mask=exists, other=0).to(ACC)


@triton.jit
def is_stored(h, begin, count, classes):
    """Which classes have a stored value, (BLOCK_R, BLOCK_C), by binary search: the classes of a row are sorted."""
    low = begin[:, None] + tl.zeros_like(classes)[None, :]
    high = low + count[:, None]
    end = high
    width = tl.max(count, 0)
    while width > 0:
        middle = (low + high) // 2
        less = tl.load(h.col + middle, mask=low < high, other=0) < classes[None, :]
        high = tl.where(less, high, middle)  # where low == high, middle is both and stays
        low = tl.where(less & (low < high), middle + 1, low)
        width = width // 2
    return tl.load(h.col + low, mask=low < end, other=-1) == classes[None, :]


@triton.jit
def base_tile(h, label, counted, classes, mask, ACC: tl.constexpr):
    """The base of H, 0 where an entry takes its place, (BLOCK_R, BLOCK_C). A constant base counts as 1 here."""
    on_diagonal = classes[None, :] == label[:, None]
    if h.matrix is not None:
        at = h.matrix + (label * multiple(h.matrix_row, h.matrix_align))[:, None] + (classes * h.matrix_class)[None, :]
        # evict_last: other rows of logits will want this row of H, and nobody the logits
        tile = tl.load(at, mask=mask & counted[:, None], other=0, eviction_policy="evict_last").to(ACC)
        if h.diagonal is not None:
            tile += tl.where(on_diagonal, diagonal_of(h, label, counted, ACC)[:, None], 0)
    else:
        tile = mask.to(ACC)
        if h.has_entry:
            tile = tl.where(on_diagonal, 0, tile)
    if h.crow is not None:
        begin, count = stored_range(h, label, counted)
        tile = tl.where(is_stored(h, begin, count, classes), 0, tile)
    return tile


@triton.jit
def similarity_tile(h, base, label, counted, classes, ACC: tl.constexpr):
    """H without its stored values, (BLOCK_R, BLOCK_C) or broadcast to it; `base` is the `base_tile` of a matrix."""
    if h.matrix is not None:
        return base
    elif h.has_entry:
        background = background_of(h, ACC)
        entry = background + diagonal_of(h, label, counted, ACC)
        return tl.where(classes[None, :] == label[:, None], entry[:, None], background)
    else:
        return background_of(h, ACC)


@triton.jit
def dot_of(similarity, number):
    """similarity * number, where 0 times infinity is 0."""
    return tl.where(similarity == 0, 0, similarity * number)


@triton.jit
def all_of_h(
    h, dot, mass, tensor, row, shift, label, counted, ACC: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr
):
    """(sum_j H[l, j] (t_j - shift), sum_j H[l, j]), (BLOCK_R,), from the same sums over the `base_tile`s.

    t is a row of `tensor`, which begins at `row`."""
    if h.matrix is None:
        background = background_of(h, ACC)
        dot, mass = dot_of(background, dot), background * mass
    if h.crow is not None:
        begin, count = stored_range(h, label, counted)
        for first in range(0, tl.max(count, 0), BLOCK_E):
            exists, column, value = stored_values(h, begin, count, first, ACC)
            at = row[:, None] + to_classes(tensor, column, ALIGN, LANES)
            t = tl.load(at, mask=exists, other=0).to(ACC)  # (BLOCK_R, BLOCK_E)
            dot += tl.sum(dot_of(value, t - shift[:, None]), 1)
            mass += tl.sum(value, 1)
    elif h.has_entry:
        entry = background_of(h, ACC) + diagonal_of(h, label, counted, ACC)
        t = tl.load(row + to_classes(tensor, label, ALIGN, LANES), mask=counted, other=0).to(ACC)
        dot += dot_of(entry, t - shift)
        mass += entry
    return dot, mass


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of_program(
    tensor, n_rows, inner_size, BLOCK_R: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr
):
    """The rows of this program, (BLOCK_R,): (number, which exist, outer position, inner position)."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * BLOCK_R + tl.arange(0, BLOCK_R)
    if LANES:
        inner_size = multiple(inner_size, ALIGN)
        n_rows = multiple(n_rows, ALIGN)
        # 4 bytes for a thread: a warp reads 128 bytes that lie side by side with that too, and a thread that has few
        # rows has few registers with their sums, maxima and addresses. Only where no two of them straddle the end.
        bits: tl.constexpr = tensor.data.dtype.element_ty.primitive_bitwidth
        few: tl.constexpr = 32 // bits if ALIGN > 1 and bits < 32 else 1
        return row, row < n_rows, row // inner_size, tl.max_contiguous(row % inner_size, few)
    return row, row < n_rows, row // inner_size, row % inner_size


@triton.jit
def classes_of_tile(n_classes, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr):
    """(0 .. BLOCK_C, the number of classes), so that offsets made of them are wide enough and known to be aligned."""
    columns = tl.arange(0, BLOCK_C)
    if WIDE:
        columns = columns.to(tl.int64)
    if not LANES:
        n_classes = multiple(n_classes, ALIGN)
    return columns, n_classes


@triton.jit
def labels_of(labels, row, exists, ignore_index, n_labels):
    """(label or 0, whether the row is not ignored, whether it has a label in range besides), (BLOCK_R,)."""
    label = tl.load(labels.data + row * labels.stride, mask=exists, other=0)
    kept = exists & (label != ignore_index)
    counted = kept & (label >= 0) & (label < n_labels)
    return tl.where(counted, label, 0).to(row.dtype), kept, counted


@triton.jit
def load_per_row(tensor, row, exists, ACC: tl.constexpr):
    return tl.load(tensor.data + row * tensor.stride, mask=exists, other=0).to(ACC)


@triton.jit
def shift_of(maximum):
    """What logits are shifted by: their maximum, unless that is infinite; NaN shows in the sums all the same."""
    return tl.where(tl.abs(maximum) == float("inf"), 0, maximum)


@triton.jit
def rescaling(maximum, new_maximum):
    """(what sums of exponentials shifted by the one maximum are multiplied by when the other takes its place, by how
    much logits rise)."""
    rise = shift_of(maximum) - shift_of(new_maximum)
    return tl.where(maximum == -float("inf"), 0, tl.exp(rise)), rise


@triton.jit
def softmax_terms(maximum, total):
    """(1 / sum of exponentials, log of it, log-sum-exp), (BLOCK_R,). The first two are NaN for a row of only -inf and
    for one with +inf, as all its results then are but the last."""
    infinite = tl.abs(maximum) == float("inf")
    log_total = tl.log(total)
    lse = shift_of(maximum) + log_total
    return tl.where(infinite, float("nan"), 1 / total), tl.where(infinite, float("nan"), log_total), lse


@triton.jit
def load_tile(
    tensor, at, classes, mask, other, ACC: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, KEEP: tl.constexpr
):
    """Classes of the rows that begin at `at`, (BLOCK_R, BLOCK_C). KEEP: they will be read once more."""
    tile = at[:, None] + to_classes(tensor, classes, ALIGN, LANES)[None, :]
    return tl.load(tile, mask=mask, other=other, eviction_policy="evict_last" if KEEP else "evict_first").to(ACC)


@triton.jit
def store_tile(tensor, at, classes, mask, value, ALIGN: tl.constexpr, LANES: tl.constexpr):
    tile = at[:, None] + to_classes(tensor, classes, ALIGN, LANES)[None, :]
    tl.store(tile, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def tile_sums(x, shift, base, t):
    """(exp(x - shift), its sum, the sum of base * t, the sum of the base) over the classes of a tile."""
    exponentials = tl.exp(x - shift[:, None])
    total = tl.sum(exponentials, 1)
    if base is not None:
        return exponentials, total, tl.sum(dot_of(base, t), 1), tl.sum(base, 1)
    else:
        return exponentials, total, tl.zeros_like(total), tl.zeros_like(total)


@triton.jit
def gradients(p, similarity, slope, counted, scale, scale_lse):
    """(gradient of the losses, gradient for the upstream gradients `scale` and `scale_lse`), in the shape of p."""
    gradient = slope[:, None] * p - similarity
    result = tl.where(counted[:, None], scale[:, None] * gradient, 0)  # 0 for an ignored row, whatever is in it
    if scale_lse is not None:
        result += scale_lse[:, None] * p
    return gradient, result


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_infogain_kernel(
    logits,
    labels,
    h,
    ignore_index,
    z_loss: tl.float64,
    n_rows,
    n_classes,
    n_labels,
    inner_size,
    loss,
    lse,
    norm,
    shift_and_log_total,
    grad,
    upstream,
    upstream_lse,
    made_for,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Whatever is wanted of loss, lse, norm and gradient. With `made_for`, `grad` holds the gradient for that upstream
    gradient of the loss already, and only rows for which it is another are written."""
    row, exists, outer, inner = rows_of_program(logits, n_rows, inner_size, BLOCK_R, ALIGN, LANES, WIDE)
    if made_for is not None and upstream_lse is None:
        exists = exists & (load_per_row(upstream, row, exists, ACC) != load_per_row(made_for, row, exists, ACC))
        if tl.max(exists.to(tl.int32), 0) == 0:
            return
    label, kept, counted = labels_of(labels, row, exists, ignore_index, n_labels)
    at = rows_at(logits, outer, inner, ALIGN, LANES)  # (BLOCK_R,)
    columns, n_classes = classes_of_tile(n_classes, BLOCK_C, ALIGN, LANES, WIDE)

    if WHOLE:
        mask = exists[:, None] & (columns < n_classes)[None, :]
        x = load_tile(logits, at, columns, mask, -float("inf"), ACC, ALIGN, LANES, False)  # (BLOCK_R, BLOCK_C)
        base = None
        if h.has_base:
            base = base_tile(h, label, counted, columns, mask, ACC)
        maximum = tl.max(x, 1)
        shift = shift_of(maximum)
        exponentials, total, dot, mass = tile_sums(x, shift, base, x - shift[:, None])
    else:
        zeros, maximum = tl.zeros((BLOCK_R,), ACC), tl.full((BLOCK_R,), -float("inf"), ACC)
        total, dot, mass = zeros, zeros, zeros
        total_lost, dot_lost, mass_lost = zeros, zeros, zeros
        for start in tl.range(0, n_classes, BLOCK_C, num_stages=STAGES):
            classes = start + columns
            mask = exists[:, None] & (classes < n_classes)[None, :]
            x = load_tile(logits, at, classes, mask, -float("inf"), ACC, ALIGN, LANES, True)
            base = None
            if h.has_base:
                base = base_tile(h, label, counted, classes, mask, ACC)
            risen = tl.maximum(maximum, tl.max(x, 1))
            factor, rise = rescaling(maximum, risen)
            maximum, shift = risen, shift_of(risen)
            exponentials, tile_total, tile_dot, tile_mass = tile_sums(x, shift, base, x - shift[:, None])
            total, total_lost = add(total * factor, total_lost * factor, tile_total)
            dot, dot_lost = add(dot + dot_of(mass, rise), dot_lost, tile_dot)
            mass, mass_lost = add(mass, mass_lost, tile_mass)
        shift = shift_of(maximum)

    dot, mass = all_of_h(h, dot, mass, logits, at, shift, label, counted, ACC, ALIGN, LANES)
    inverse, log_total, lse_of_row = softmax_terms(maximum, total)
    z = tl.full((1,), z_loss, ACC)
    if loss is not None:
        loss_of_row = mass * log_total - dot + z * lse_of_row * lse_of_row
        tl.store(loss + row, tl.where(counted, loss_of_row, tl.where(kept, float("nan"), 0)), mask=exists)
    if lse is not None:
        tl.store(lse + row, lse_of_row, mask=exists)
    if shift_and_log_total is not None:
        tl.store(shift_and_log_total + row, shift, mask=exists)
        tl.store(shift_and_log_total + n_rows + row, log_total, mask=exists)

    if grad is not None or norm is not None:
        slope = mass + 2 * z * lse_of_row
        squares = tl.zeros((BLOCK_R,), ACC)
        scale, scale_lse, grad_at = squares, None, at
        if grad is not None:
            scale = load_per_row(upstream, row, exists, ACC)
            grad_at = rows_at(grad, outer, inner, ALIGN, LANES)
        if upstream_lse is not None:
            scale_lse = load_per_row(upstream_lse, row, exists, ACC)
        if h.crow is not None:
            begin, count = stored_range(h, label, counted)
        n_tiles = 1 if WHOLE else tl.cdiv(n_classes, BLOCK_C)
        for tile in tl.range(0, n_tiles, num_stages=STAGES):
            # backwards: what was read last is the likeliest to be in a cache still
            classes = (n_tiles - 1 - tile) * BLOCK_C + columns
            mask = exists[:, None] & (classes < n_classes)[None, :]
            base_again = None
            if WHOLE:
                again = exponentials
                if h.matrix is not None:
                    base_again = base
            else:
                x = load_tile(logits, at, classes, mask, -float("inf"), ACC, ALIGN, LANES, False)
                again = tl.exp(x - shift[:, None])
                if h.matrix is not None:
                    base_again = base_tile(h, label, counted, classes, mask, ACC)
            similarity = similarity_tile(h, base_again, label, counted, classes, ACC)
            p = again * inverse[:, None]
            gradient, result = gradients(p, similarity, slope, counted, scale, scale_lse)
            if grad is not None:
                store_tile(grad, grad_at, classes, mask, result, ALIGN, LANES)
            if norm is not None:
                if h.crow is not None:
                    mask = mask & ~is_stored(h, begin, count, classes)
                squares += tl.sum(tl.where(mask, gradient * gradient, 0), 1)

        if h.crow is not None:
            tl.debug_barrier()  # other threads wrote what lies under the stored values
            for first in range(0, tl.max(count, 0), BLOCK_E):
                there, column, value = stored_values(h, begin, count, first, ACC)
                t = tl.load(at[:, None] + to_classes(logits, column, ALIGN, LANES), mask=there, other=0).to(ACC)
                p = tl.exp(t - shift[:, None]) * inverse[:, None]  # (BLOCK_R, BLOCK_E)
                gradient, result = gradients(p, value, slope, counted, scale, scale_lse)
                if grad is not None:
                    tl.store(grad_at[:, None] + to_classes(grad, column, ALIGN, LANES), result, mask=there)
                if norm is not None:
                    squares += tl.sum(tl.where(there, gradient * gradient, 0), 1)
        if norm is not None:
            tl.store(norm + row, tl.where(counted, tl.sqrt(squares), 0), mask=exists)


@triton.jit
def double_backward_kernel(
    logits,
    labels,
    h,
    ignore_index,
    z_loss: tl.float64,
    n_rows,
    n_classes,
    n_labels,
    inner_size,
    upstream,
    upstream_lse,
    vector,
    product,
    dot_loss,
    dot_lse,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For v, a row of `vector`: the Hessian times v, <gradient of the loss, v>, and <p, v>."""
    row, exists, outer, inner = rows_of_program(logits, n_rows, inner_size, BLOCK_R, ALIGN, LANES, WIDE)
    label, _kept, counted = labels_of(labels, row, exists, ignore_index, n_labels)
    at = rows_at(logits, outer, inner, ALIGN, LANES)  # (BLOCK_R,)
    vector_at = rows_at(vector, outer, inner, ALIGN, LANES)
    columns, n_classes = classes_of_tile(n_classes, BLOCK_C, ALIGN, LANES, WIDE)

    if WHOLE:
        mask = exists[:, None] & (columns < n_classes)[None, :]
        x = load_tile(logits, at, columns, mask, -float("inf"), ACC, ALIGN, LANES, False)  # (BLOCK_R, BLOCK_C)
        v = load_tile(vector, vector_at, columns, mask, 0, ACC, ALIGN, LANES, False)  # (BLOCK_R, BLOCK_C)
        base = None
        if h.has_base:
            base = base_tile(h, label, counted, columns, mask, ACC)
        maximum = tl.max(x, 1)
        shift = shift_of(maximum)
        exponentials, total, dot, mass = tile_sums(x, shift, base, v)
        mean = tl.sum(exponentials * v, 1)
    else:
        zeros, maximum = tl.zeros((BLOCK_R,), ACC), tl.full((BLOCK_R,), -float("inf"), ACC)
        total, dot, mass, mean = zeros, zeros, zeros, zeros
        total_lost, dot_lost, mass_lost, mean_lost = zeros, zeros, zeros, zeros
        for start in tl.range(0, n_classes, BLOCK_C, num_stages=STAGES):
            classes = start + columns
            mask = exists[:, None] & (classes < n_classes)[None, :]
            x = load_tile(logits, at, classes, mask, -float("inf"), ACC, ALIGN, LANES, True)
            v = load_tile(vector, vector_at, classes, mask, 0, ACC, ALIGN, LANES, True)
            base = None
            if h.has_base:
                base = base_tile(h, label, counted, classes, mask, ACC)
            risen = tl.maximum(maximum, tl.max(x, 1))
            factor, _rise = rescaling(maximum, risen)
            maximum, shift = risen, shift_of(risen)
            exponentials, tile_total, tile_dot, tile_mass = tile_sums(x, shift, base, v)
            total, total_lost = add(total * factor, total_lost * factor, tile_total)
            mean, mean_lost = add(mean * factor, mean_lost * factor, tl.sum(exponentials * v, 1))
            dot, dot_lost = add(dot, dot_lost, tile_dot)
            mass, mass_lost = add(mass, mass_lost, tile_mass)
        shift = shift_of(maximum)

    dot, mass = all_of_h(h, dot, mass, vector, vector_at, tl.zeros_like(mass), label, counted, ACC, ALIGN, LANES)
    inverse, _log_total, lse_of_row = softmax_terms(maximum, total)
    z = tl.full((1,), z_loss, ACC)
    mean *= inverse
    slope = mass + 2 * z * lse_of_row
    tl.store(dot_loss + row, tl.where(counted, slope * mean - dot, 0), mask=exists)
    tl.store(dot_lse + row, mean, mask=exists)

    scale = tl.where(counted, load_per_row(upstream, row, exists, ACC), 0)
    factor = scale * slope
    if upstream_lse is not None:
        factor += load_per_row(upstream_lse, row, exists, ACC)
    constant = 2 * z * scale * mean - factor * mean
    product_at = rows_at(product, outer, inner, ALIGN, LANES)
    n_tiles = 1 if WHOLE else tl.cdiv(n_classes, BLOCK_C)
    for tile in tl.range(0, n_tiles, num_stages=STAGES):
        classes = (n_tiles - 1 - tile) * BLOCK_C + columns
        mask = exists[:, None] & (classes < n_classes)[None, :]
        if WHOLE:
            again = exponentials
            v_again = v
        else:
            x = load_tile(logits, at, classes, mask, -float("inf"), ACC, ALIGN, LANES, False)
            v_again = load_tile(vector, vector_at, classes, mask, 0, ACC, ALIGN, LANES, False)
            again = tl.exp(x - shift[:, None])
        result = again * inverse[:, None] * (factor[:, None] * v_again + constant[:, None])
        if upstream_lse is None:  # an ignored row stays 0, whatever is in it
            result = tl.where(counted[:, None], result, 0)
        store_tile(product, product_at, classes, mask, result, ALIGN, LANES)


@triton.jit
def backward_matrix_kernel(
    logits,
    shift_and_log_total,
    upstream,
    order,
    begin,
    result,
    n_rows,
    n_classes,
    inner_size,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row of the gradient of H, some of its classes: the rows of logits with that label, in their order."""
    label = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        columns = columns.to(tl.int64)
    total, lost = tl.zeros((BLOCK_C,), ACC), tl.zeros((BLOCK_C,), ACC)
    first, end = tl.load(begin + label), tl.load(begin + label + 1)
    for start in range(first, end, BLOCK_R):
        position = start + tl.arange(0, BLOCK_R)
        exists = position < end
        row = tl.load(order + position, mask=exists, other=0)  # (BLOCK_R,)
        mask = exists[:, None] & (columns < n_classes)[None, :]
        at = rows_at(logits, row // inner_size, row % inner_size, 1, False)
        x = load_tile(logits, at, columns, mask, 0, ACC, 1, False, False)  # (BLOCK_R, BLOCK_C)
        shift = tl.load(shift_and_log_total + row, mask=exists, other=0)
        log_total = tl.load(shift_and_log_total + n_rows + row, mask=exists, other=0)
        log_p = (x - shift[:, None]) - log_total[:, None]
        scale = load_per_row(upstream, row, exists, ACC)
        total, lost = add(total, lost, tl.sum(tl.where(mask, -scale[:, None] * log_p, 0), 0))
    tl.store(result + label * n_classes + columns, total, mask=columns < n_classes)


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------

OPS = (
    "softmax_infogain",
    "softmax_infogain_reduced",
    "softmax_infogain_backward",
    "softmax_infogain_backward_",
    "softmax_infogain_double_backward",
    "softmax_infogain_backward_matrix",
    "count_labels",
)
_TILE_OF_H = (4, 1024)  # backward_matrix: rows of logits added at once, and their largest number of classes
Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _similarity(parts: Parts, dtype: torch.dtype) -> Similarity:
    matrix, background, diagonal, crow, col, values = parts
    row, column = (0, 0) if matrix is None else matrix.stride()
    align = alignment(dtype.itemsize, row) if column == 1 else 1
    diagonal_stride = 0 if diagonal is None or diagonal.dim() == 0 else diagonal.stride(0)
    crow, col, values = (None if part is None else part.contiguous() for part in (crow, col, values))
    has_base = matrix is not None or background is not None
    has_entry = matrix is None and crow is None and (diagonal is not None or background is None)
    constants = (tl.constexpr(constant) for constant in (has_base, has_entry, align))
    return Similarity(*constants, matrix, row, column, background, diagonal, diagonal_stride, crow, col, values)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(name: str, tensor: Tensor | None, *shape: int, dtype: torch.dtype | None = None) -> None:
    """No kernel may read or write beyond its arguments, whoever calls the op."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor is not None and dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: dtype must be {dtype}, got {tensor.dtype}")


def _check_arguments(logits: Tensor, labels: Tensor, parts: Parts, like_logits: dict, per_row_inputs: dict) -> None:
    if logits.dim() != 3:
        raise ValueError(f"logits: expected shape (O, C, I), got {tuple(logits.shape)}")
    outer, classes, inner = logits.shape
    _check("labels", labels, outer, inner, dtype=torch.int64)
    for name, tensor in like_logits.items():
        _check(name, tensor, *logits.shape)
    for name, tensor in per_row_inputs.items():
        _check(name, tensor, outer, inner, dtype=_accumulation_dtype(logits.dtype))
    matrix, background, diagonal, crow, col, values = parts
    n_rows = classes if matrix is None else len(matrix)
    _check("matrix", matrix, n_rows, classes)
    _check("background", background)
    if diagonal is not None and diagonal.dim():
        _check("diagonal", diagonal, n_rows)
    _check("crow", crow, n_rows + 1, dtype=torch.int64)
    _check("col", col, 0 if values is None else len(values), dtype=torch.int64)


def _launch_over_rows(
    kernel,
    logits: Tensor,
    labels: Tensor,
    parts: Parts,
    ignore_index: int,
    z_loss: float,
    like_logits: dict[str, Tensor | None],
    per_row_inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
) -> None:
    """Run a kernel on all rows. Its arguments by kind: tensors in the shape of the logits, tensors (O, I), and the
    contiguous tensors (O, I) that it writes.

    The one step that layouts take: rows of classes that do not lie side by side, one for each outer position, are taken
    for the inner positions of one; then whatever lies side by side is either the classes or the inner axis.
    """
    _check_arguments(logits, labels, parts, like_logits, per_row_inputs)
    outer, classes, inner = logits.shape
    side_by_side = logits.stride(1) == 1 or classes == 1
    swapped = inner == 1 and not side_by_side
    inner = outer if swapped else inner
    tensors = [logits, *(tensor for tensor in like_logits.values() if tensor is not None)]
    views = [rows(tensor, swapped) for tensor in tensors]
    if side_by_side:
        aligned = all(view.classes == 1 for view in views)
        multiples = [classes, *(view.outer for view in views), *(view.inner for view in views if inner > 1)]
    else:
        aligned = all(view.inner == 1 for view in views)
        multiples = [inner, *(view.outer for view in views if not swapped), *(view.classes for view in views)]
    align = alignment(logits.element_size(), *multiples) if aligned else 1
    similarity = _similarity(parts, logits.dtype)
    has_base, has_stored = parts[0] is not None or parts[1] is not None, parts[5] is not None
    more = (has_base, has_stored, "vector" in like_logits or per_row_inputs["upstream_lse"] is not None)
    kept = min(2 ** sum(more), 4)
    tiles = tiles_for(classes, 1 if side_by_side else inner, logits.dtype, architecture_of(logits.device), kept)
    wide = max(map(extent, (*tensors, *parts)))  # beyond the end of a tensor lies at most a tile
    launch(
        kernel,
        (triton.cdiv(labels.numel(), tiles.rows),),
        logits,
        rows(logits, swapped),
        per_row(labels),
        similarity,
        ignore_index,
        z_loss,
        labels.numel(),
        classes,
        classes if parts[0] is None else parts[0].shape[0],
        inner,
        **{name: rows(tensor, swapped) for name, tensor in like_logits.items()},
        **{name: per_row(tensor) for name, tensor in per_row_inputs.items()},
        **outputs,
        ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        ALIGN=align,
        LANES=not side_by_side,
        WIDE=wide > INT32_MAX - 2**20,
        WHOLE=tiles.whole,
        BLOCK_R=tiles.rows,
        BLOCK_C=tiles.classes,
        num_warps=tiles.num_warps,
    )


def _run(
    logits: Tensor,
    labels: Tensor,
    parts: Parts,
    ignore_index: int,
    z_loss: float,
    *,
    loss: Tensor | None = None,
    lse: Tensor | None = None,
    norm: Tensor | None = None,
    shift_and_log_total: Tensor | None = None,
    grad: Tensor | None = None,
    upstream: Tensor | None = None,
    upstream_lse: Tensor | None = None,
    made_for: Tensor | None = None,
) -> None:
    """Run `softmax_infogain_kernel`; outputs that are None are not wanted."""
    inputs = {"upstream": upstream, "upstream_lse": upstream_lse, "made_for": made_for}
    outputs = {"loss": loss, "lse": lse, "norm": norm, "shift_and_log_total": shift_and_log_total}
    rows_of = (logits, labels, parts, ignore_index, z_loss)
    _launch_over_rows(softmax_infogain_kernel, *rows_of, {"grad": grad}, inputs, outputs)


def _new_per_row(logits: Tensor, wanted: bool = True) -> Tensor:
    """An uninitialized (O, I) tensor of the accumulation type; one without elements unless it is wanted."""
    shape = logits.shape[::2] if wanted else (0,)
    return logits.new_empty(shape, dtype=_accumulation_dtype(logits.dtype))


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
    """Loss of every row, its log-sum-exp, the gradient for the upstream gradient `row_scale`, and its norm for 1."""
    parts = (matrix, background, diagonal, crow, col, values)
    loss, lse, norm = _new_per_row(logits), _new_per_row(logits, need_lse), _new_per_row(logits, need_norm)
    grad = logits.new_empty(0) if row_scale is None else torch.empty_like(logits)
    _run(
        logits,
        labels,
        parts,
        ignore_index,
        z_loss,
        loss=loss,
        lse=lse if need_lse else None,
        norm=norm if need_norm else None,
        grad=None if row_scale is None else grad,
        upstream=row_scale,
    )
    return loss, lse, grad, norm


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
    dtype = _accumulation_dtype(logits.dtype)
    if divisor is None:
        denominator = count_labels(labels, ignore_index, dtype)
    else:
        denominator = torch.full((), divisor, dtype=dtype, device=logits.device)
    scale = denominator.reciprocal()
    row_scale = scale.expand(labels.shape) if sample_weight is None else sample_weight * scale
    parts = (matrix, background, diagonal, crow, col, values)
    row_scale = row_scale if need_grad else None
    loss, _, grad, _ = softmax_infogain(logits, labels, *parts, ignore_index, z_loss, row_scale, False, False)
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
    """Gradient of sum(grad_loss * loss) + sum(grad_lse * lse) with respect to the logits."""
    parts = (matrix, background, diagonal, crow, col, values)
    grad = torch.empty_like(logits)
    _run(logits, labels, parts, ignore_index, z_loss, grad=grad, upstream=grad_loss, upstream_lse=grad_lse)
    return grad


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
    and `grad_lse`, in place. Every program decides on the device whether its rows hold it already."""
    parts = (matrix, background, diagonal, crow, col, values)
    upstream = {"upstream": grad_loss, "upstream_lse": grad_lse, "made_for": row_scale}
    _run(logits, labels, parts, ignore_index, z_loss, grad=grad, **upstream)


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
    product, dot_loss, dot_lse = torch.empty_like(logits), _new_per_row(logits), _new_per_row(logits)
    _launch_over_rows(
        double_backward_kernel,
        logits,
        labels,
        parts,
        ignore_index,
        z_loss,
        {"vector": grad_grad, "product": product},
        {"upstream": grad_loss, "upstream_lse": grad_lse},
        {"dot_loss": dot_loss, "dot_lse": dot_lse},
    )
    return product, dot_loss, dot_lse


def softmax_infogain_backward_matrix(
    logits: Tensor, labels: Tensor, n_rows: int, ignore_index: int, grad_loss: Tensor
) -> Tensor:
    """Gradient of sum(grad_loss * loss) with respect to a dense H of shape (n_rows, C), in accumulation type."""
    classes = logits.shape[1]
    result = logits.new_empty(n_rows, classes, dtype=_accumulation_dtype(logits.dtype))
    _check("grad_loss", grad_loss, logits.shape[0], logits.shape[2], dtype=result.dtype)
    # rows sorted by label, those without one in range last: every row of H is then the sum of a range, in a fixed order
    flat = labels.reshape(-1)
    counted = (flat != ignore_index) & (flat >= 0) & (flat < n_rows)
    sorted_labels, order = torch.where(counted, flat, n_rows).sort(stable=True)
    begin = torch.searchsorted(sorted_labels, torch.arange(n_rows + 1, device=labels.device))
    terms = logits.new_empty(2, max(len(flat), 1), dtype=result.dtype)
    _run(logits, labels, (None,) * 6, ignore_index, 0.0, shift_and_log_total=terms)
    block_rows, most = _TILE_OF_H
    block = min(triton.next_power_of_2(max(classes, 1)), most)
    launch(
        backward_matrix_kernel,
        (n_rows, triton.cdiv(classes, block)),
        logits,
        rows(logits),
        terms,
        per_row(grad_loss),
        order,
        begin,
        result,
        len(flat),
        classes,
        logits.shape[2],
        ACC=tl.float64 if result.dtype == torch.float64 else tl.float32,
        WIDE=extent(logits) > INT32_MAX,
        BLOCK_R=block_rows * most // block,
        BLOCK_C=block,
        num_warps=8,
    )
    return result


def count_labels(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How many labels are not `ignore_index`: a tensor of this dtype without dimensions."""
    return (labels != ignore_index).sum().to(dtype)
