"""Every op: its schema, its fake kernel, its batching rule, and the call of the backend that answers.

Ops live in `torch.ops.lgd_kernels`, are functional unless their name ends in an underscore, and carry no autograd:
the `torch.autograd.Function`s in `autograd/` stand around them. What each op computes is said in `reference.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lgd_kernels import backends
from lgd_kernels.reference import accumulation_dtype
from lgd_kernels.reference import check_labels as check_labels_of_reference
from lgd_kernels.reference.decoupled_linear import n_layers_of, stack_by_stack
from lgd_kernels.stacks import call_by_key

_LIBRARY = torch.library.Library("lgd_kernels", "DEF")
_names: list[str] = []


def names() -> list[str]:
    """The ops, in the order of their definition."""
    return list(_names)


def _answer(name: str, device_type: str, logits_at: int | None, *args):
    kernels = backends.implementation(name, device_type, None if logits_at is None else args[logits_at])
    # on the CPU the kernels and the reference check labels themselves, except the ones made for a device
    if backends.CHECK_LABELS if device_type == "cuda" else kernels not in (backends.extension, backends.reference):
        _check_labels(name, args)
    return getattr(kernels, name)(*args)


def _check_labels(name: str, args: tuple) -> None:
    """Raise IndexError if an op of softmax_infogain is called with a label out of range."""
    schema = getattr(torch.ops.lgd_kernels, name).default._schema
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=True))
    if "logits" in named and "labels" in named:
        matrix = named.get("matrix")
        n_rows = named.get("n_rows", named["logits"].shape[1]) if matrix is None else matrix.shape[0]
        check_labels_of_reference(named["labels"], named["ignore_index"], n_rows, wait_for_device=True)


def _answer_stacks(name: str, device_type: str, logits_at: int | None, *args):
    """The same for an op on lists of stacks: each stack is answered by the backend that is best for it, so that its
    results do not depend on what else is in the lists."""
    (z, weight), wide = args[:2], [False]
    if backends.asks_for_width(device_type) and 0 < len(z) == len(weight):
        wide = [backends.is_wide(*stack) for stack in zip(z, weight, strict=True)]

    def call(wide, *args):
        return getattr(backends.implementation(name, device_type, wide=wide), name)(*args)

    return call_by_key(wide, call, args)


def _define(name: str, schema: str, fake: Callable, vmap: Callable | None = None, answer: Callable = _answer) -> None:
    """Define op `name`, answered by whichever backend serves the device."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    arguments = [argument.name for argument in getattr(torch.ops.lgd_kernels, name).default._schema.arguments]
    logits_at = arguments.index("logits") if "logits" in arguments else None
    for key, device_type in (("CPU", "cpu"), ("CUDA", "cuda")):
        _LIBRARY.impl(name, functools.partial(answer, name, device_type, logits_at), key)
    torch.library.register_fake(f"lgd_kernels::{name}", fake, lib=_LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"lgd_kernels::{name}", vmap, lib=_LIBRARY)
    _names.append(name)


# ---------------------------------------------------------------------------------------------------------------------
# Batching rules
# ---------------------------------------------------------------------------------------------------------------------


def _in_front(x: Tensor, batch_dim: int | None, batch_size: int) -> Tensor:
    """x with its batch dimension first; one that has none is expanded."""
    return x.expand(batch_size, *x.shape) if batch_dim is None else x.movedim(batch_dim, 0)


def _vmap_by_loop(op: Callable, info, in_dims, *args):
    """One call for each batch entry: for the rare case that H itself is batched."""
    calls = [
        op(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])


def _vmap_over_rows(op: Callable, row_arguments: set[int], info, in_dims, *args):
    """The batch becomes part of the outer dimension of every per-row argument (positions `row_arguments`)."""
    if any(dim is not None for i, dim in enumerate(in_dims) if i not in row_arguments):
        return _vmap_by_loop(op, info, in_dims, *args)
    merged = [
        _in_front(a, dim, info.batch_size).flatten(0, 1) if i in row_arguments and a is not None else a
        for i, (a, dim) in enumerate(zip(args, in_dims, strict=True))
    ]

    def split(output: Tensor) -> Tensor:  # an output that was not asked for has no elements and shape (0,)
        if output.dim() == 1:
            return output.expand(info.batch_size, 0)
        return output.unflatten(0, (info.batch_size, output.shape[0] // info.batch_size))

    outputs = op(*merged)
    if isinstance(outputs, Tensor):
        return split(outputs), 0
    return tuple(split(output) for output in outputs), (0,) * len(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# softmax_infogain
# ---------------------------------------------------------------------------------------------------------------------

_H = "Tensor? matrix, Tensor? background, Tensor? diagonal, Tensor? crow, Tensor? col, Tensor? values"
_ROWS = f"Tensor logits, Tensor labels, {_H}, int ignore_index, float z_loss"


def _per_row(logits: Tensor) -> Tensor:
    """An uninitialized tensor (O, I) of the accumulation type for logits (O, C, I)."""
    return logits.new_empty(logits.shape[0], logits.shape[2], dtype=accumulation_dtype(logits.dtype))


def _softmax_infogain_fake(logits, labels, *rest):
    row_scale, need_lse, need_norm = rest[-3:]
    loss = _per_row(logits)
    lse, norm = (torch.empty_like(loss) if needed else loss.new_empty(0) for needed in (need_lse, need_norm))
    return loss, lse, logits.new_empty(0) if row_scale is None else torch.empty_like(logits), norm


def _softmax_infogain_reduced_fake(logits, labels, *rest):
    loss = logits.new_empty((), dtype=accumulation_dtype(logits.dtype))
    return loss, torch.empty_like(loss), torch.empty_like(logits) if rest[-1] else logits.new_empty(0)


_define(
    "softmax_infogain",
    f"({_ROWS}, Tensor? row_scale, bool need_lse, bool need_norm) -> (Tensor, Tensor, Tensor, Tensor)",
    _softmax_infogain_fake,
    lambda info, in_dims, *args: _vmap_over_rows(softmax_infogain, {0, 1, 10}, info, in_dims, *args),
)
_define(
    "softmax_infogain_reduced",
    f"({_ROWS}, Tensor? sample_weight, float? divisor, bool need_grad) -> (Tensor, Tensor, Tensor)",
    _softmax_infogain_reduced_fake,
)
_define(
    "softmax_infogain_backward",
    f"({_ROWS}, Tensor grad_loss, Tensor? grad_lse) -> Tensor",
    lambda logits, *rest: torch.empty_like(logits),
    lambda info, in_dims, *args: _vmap_over_rows(softmax_infogain_backward, {0, 1, 10, 11}, info, in_dims, *args),
)
_define(
    "softmax_infogain_backward_",
    f"(Tensor(a!) grad, Tensor row_scale, {_ROWS}, Tensor grad_loss, Tensor? grad_lse) -> ()",
    lambda *args: None,
)
_define(
    "softmax_infogain_double_backward",
    f"({_ROWS}, Tensor grad_loss, Tensor? grad_lse, Tensor grad_grad) -> (Tensor, Tensor, Tensor)",
    lambda logits, *rest: (torch.empty_like(logits), _per_row(logits), _per_row(logits)),
    lambda info, in_dims, *args: _vmap_over_rows(
        softmax_infogain_double_backward, {0, 1, 10, 11, 12}, info, in_dims, *args
    ),
)
_define(
    "softmax_infogain_backward_matrix",
    "(Tensor logits, Tensor labels, int n_rows, int ignore_index, Tensor grad_loss) -> Tensor",
    lambda logits, labels, n_rows, *rest: logits.new_empty(
        n_rows, logits.shape[1], dtype=accumulation_dtype(logits.dtype)
    ),
    lambda info, in_dims, *args: _vmap_by_loop(softmax_infogain_backward_matrix, info, in_dims, *args),
)
_define(
    "count_labels",
    "(Tensor labels, int ignore_index, ScalarType dtype) -> Tensor",
    lambda labels, ignore_index, dtype: labels.new_empty((), dtype=dtype),
    lambda info, in_dims, *args: _vmap_by_loop(count_labels, info, in_dims, *args),
)

softmax_infogain = torch.ops.lgd_kernels.softmax_infogain.default
softmax_infogain_reduced = torch.ops.lgd_kernels.softmax_infogain_reduced.default
softmax_infogain_backward = torch.ops.lgd_kernels.softmax_infogain_backward.default
softmax_infogain_backward_ = torch.ops.lgd_kernels.softmax_infogain_backward_.default
softmax_infogain_double_backward = torch.ops.lgd_kernels.softmax_infogain_double_backward.default
softmax_infogain_backward_matrix = torch.ops.lgd_kernels.softmax_infogain_backward_matrix.default
count_labels = torch.ops.lgd_kernels.count_labels.default

# ---------------------------------------------------------------------------------------------------------------------
# local_residual and decoupled_linear. Lists of numbers have one entry per layer; those of tensors and bools that
# decoupled_linear takes and returns have one per stack of layers, so that one call serves layers of any shapes.
# Activations and hidden losses are positions in reference.ACTIVATIONS and reference.HIDDEN_LOSSES.
# ---------------------------------------------------------------------------------------------------------------------


def _on_request(wanted: bool, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous output of this shape; one without elements if it is not wanted."""
    return like.new_empty(shape if wanted else (0,), dtype=dtype or like.dtype)


def _vmap_over_layers(op: Callable, info, in_dims, *args):
    """The batch becomes part of the layers: of the first dimension of every tensor, and of every list."""
    size = info.batch_size

    def merged(argument, dim):
        if isinstance(argument, Tensor):
            return _in_front(argument, dim, size).flatten(0, 1)
        return list(argument) * size if isinstance(argument, (list, tuple)) else argument

    n_layers = _shape_of_entry(args[0], in_dims[0])[0]
    outputs = op(*(merged(a, in_dims[i]) for i, a in enumerate(args)))
    return tuple(_split_stack(output, size, n_layers) for output in outputs), (0,) * len(outputs)


def _vmap_over_stacks(op: Callable, info, in_dims, *args):
    """The batch becomes part of the layers of every stack: of the first dimension of the tensors in lists, which a
    single layer gets by it, and of what has one entry per layer, lists of numbers and tensors outside of lists. Lists
    of bools have one per stack."""
    size = info.batch_size
    shapes = [_shape_of_entry(z, dim) for z, dim in zip(args[0], in_dims[0], strict=True)]
    counts, single = [n_layers_of(shape) for shape in shapes], [len(shape) == 2 for shape in shapes]

    def merged(argument, dim):
        if isinstance(argument, Tensor):
            return torch.cat([part.flatten(0, 1) for part in _in_front(argument, dim, size).split(counts, 1)])
        if not isinstance(argument, (list, tuple)) or not argument or isinstance(argument[0], bool):
            return argument
        if isinstance(argument[0], (int, float)):
            return [number for (part,) in stack_by_stack(counts, argument) for number in list(part) * size]
        batched = [x if x is None else _in_front(x, d, size) for x, d in zip(argument, dim, strict=True)]
        return [x if x is None or one else x.flatten(0, 1) for x, one in zip(batched, single, strict=True)]

    def split(output):
        if isinstance(output, Tensor):
            parts = output.split([size * count for count in counts])
            return torch.cat([_split_stack(part, size, count) for part, count in zip(parts, counts, strict=True)], 1)
        stacks = [_split_stack(stack, size, count) for stack, count in zip(output, counts, strict=True)]
        return [stack.squeeze(1) if one else stack for stack, one in zip(stacks, single, strict=True)]

    outputs = tuple(split(output) for output in op(*(merged(a, in_dims[i]) for i, a in enumerate(args))))
    return outputs, tuple(0 if isinstance(output, Tensor) else [0] * len(output) for output in outputs)


def _shape_of_entry(x: Tensor, batch_dim: int | None) -> torch.Size:
    """The shape of one entry of the batch."""
    return x.shape if batch_dim is None else x.select(batch_dim, 0).shape


def _split_stack(output: Tensor, size: int, n_layers: int) -> Tensor:
    """The layers of all entries as (size, n_layers, ...); an output that was not asked for has shape (0,)."""
    return output.unflatten(0, (size, n_layers)) if output.shape[0] == size * n_layers else output.expand(size, 0)


def _local_residual_fake(logits, target, *rest):
    need_residual, need_gradient = rest[-2:]
    shape = logits.shape
    return (
        logits.new_empty(shape[0], dtype=accumulation_dtype(logits.dtype)),
        _on_request(need_residual, logits, *shape),
        _on_request(need_gradient, logits, *shape),
        _on_request(need_gradient, logits, *shape),
    )


def _decoupled_linear_fake(z, weight, bias, target, *rest):
    need_residual, need_gradient = rest[-2:]

    def like_target(wanted: list[bool]) -> list[Tensor]:
        return [_on_request(want, x, *y.shape) for want, x, y in zip(wanted, z, target, strict=True)]

    energy = z[0].new_empty(sum(n_layers_of(x.shape) for x in z), dtype=accumulation_dtype(z[0].dtype))
    return energy, like_target(need_residual), like_target(need_gradient), like_target(need_gradient)


def _decoupled_linear_backward_fake(z, weight, *rest):
    made = []
    for x, w, *wanted in zip(z, weight, *rest[-5:], strict=True):
        outputs = (*x.shape[:-1], w.shape[-2])
        shapes = (x.shape, w.shape, w.shape[:-1], outputs, outputs)
        dtypes = (x.dtype, w.dtype, w.dtype, x.dtype, x.dtype)
        stacks = zip(wanted, shapes, dtypes, strict=True)
        made.append([_on_request(want, x, *shape, dtype=dtype) for want, shape, dtype in stacks])
    return tuple(list(stacks) for stacks in zip(*made, strict=True))


_define(
    "local_residual",
    "(Tensor logits, Tensor target, Tensor? multiplier, Tensor? skip_input, int[] activation, int hidden_loss, "
    "float kappa, float[] rho, float[] skip, float[] dual_step, bool need_residual, bool need_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _local_residual_fake,
    lambda info, in_dims, *args: _vmap_over_layers(local_residual, info, in_dims, *args),
)
_define(
    "decoupled_linear",
    "(Tensor[] z, Tensor[] weight, Tensor?[] bias, Tensor[] target, Tensor?[] multiplier, int[] activation, "
    "bool preactivation, int hidden_loss, float kappa, float[] rho, float[] skip, float[] branch_scale, "
    "float[] dual_step, bool[] need_residual, bool[] need_gradient) -> (Tensor, Tensor[], Tensor[], Tensor[])",
    _decoupled_linear_fake,
    lambda info, in_dims, *args: _vmap_over_stacks(decoupled_linear, info, in_dims, *args),
    _answer_stacks,
)
_define(
    "decoupled_linear_backward",
    "(Tensor[] z, Tensor[] weight, Tensor[] e, Tensor[] delta, Tensor[] q, Tensor? grad_energy, int[] activation, "
    "bool preactivation, float[] skip, float[] branch_scale, bool[] need_z, bool[] need_weight, bool[] need_bias, "
    "bool[] need_target, bool[] need_multiplier) -> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    _decoupled_linear_backward_fake,
    lambda info, in_dims, *args: _vmap_over_stacks(decoupled_linear_backward, info, in_dims, *args),
    _answer_stacks,
)

_define(
    "decoupled_step_",
    "(Tensor x, Tensor(a!)[] z, Tensor(b!)[] multiplier, Tensor(c!)[] velocity, Tensor(d!)[] residual, "
    "Tensor(e!)[] weight, Tensor(f!)[] weight_first, Tensor(g!)[] weight_second, "
    "Tensor(h!)[] bias, Tensor(i!)[] bias_first, Tensor(j!)[] bias_second, Tensor target, "
    "Tensor? matrix, Tensor? background, Tensor? diagonal, Tensor? crow, Tensor? col, Tensor? values, "
    "int ignore_index, bool squared_error, int[] activation, bool preactivation, int hidden_loss, float kappa, "
    "float[] rho, float[] skip, float[] branch_scale, int steps, float step_size, float z_momentum, float dual_step, "
    "int update_rule, Tensor update_numbers) -> Tensor",
    lambda x, *rest: x.new_empty(sum(w.shape[0] for w in rest[4]), dtype=accumulation_dtype(x.dtype)),
)

local_residual = torch.ops.lgd_kernels.local_residual.default
decoupled_linear = torch.ops.lgd_kernels.decoupled_linear.default
decoupled_linear_backward = torch.ops.lgd_kernels.decoupled_linear_backward.default
decoupled_step_ = torch.ops.lgd_kernels.decoupled_step_.default

# ---------------------------------------------------------------------------------------------------------------------
# Checks that depend on values: ops, so that an Infogain can be built, and labels be checked, inside a compiled function
# ---------------------------------------------------------------------------------------------------------------------


def _define_check(name: str, schema: str, check: Callable) -> Callable:
    """Define an op that raises or does nothing, and that no compiler may drop."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, check, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lgd_kernels::{name}", lambda *args: None, lib=_LIBRARY)
    op = getattr(torch.ops.lgd_kernels, name).default
    torch.fx.node.has_side_effect(op)
    return op


def _check_finite(tensor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: every entry must be finite, found {_first(tensor, ~torch.isfinite(tensor))}")


def _check_not_negative(tensor: Tensor, name: str) -> None:
    if bool((tensor < 0).any()):
        raise ValueError(f"{name}: no entry may be negative, found {_first(tensor, tensor < 0)}")


def _first(tensor: Tensor, where: Tensor) -> str:
    index = where.nonzero()[0].tolist()
    return f"{tensor[tuple(index)].item()} at {index}"


def _check_csr(crow: Tensor, col: Tensor, n_classes: int) -> None:
    """Raise ValueError unless (crow, col) are the indices of a valid CSR matrix with n_classes rows and columns."""
    count = crow.diff()
    if int(crow[0]) != 0 or bool((count < 0).any()) or int(crow[-1]) != len(col):
        raise ValueError(f"matrix: crow_indices must rise from 0 to the number of stored entries {len(col)}")
    if bool(((col < 0) | (col >= n_classes)).any()):
        raise ValueError(f"matrix: col_indices must be in [0, {n_classes})")
    row = torch.repeat_interleave(torch.arange(n_classes, device=col.device), count)
    if bool(((row * n_classes + col).diff() <= 0).any()):
        raise ValueError("matrix: col_indices must be sorted and distinct within each row")


check_finite = _define_check("check_finite", "(Tensor tensor, str name) -> ()", _check_finite)
check_not_negative = _define_check("check_not_negative", "(Tensor tensor, str name) -> ()", _check_not_negative)
check_csr = _define_check("check_csr", "(Tensor crow, Tensor col, int n_classes) -> ()", _check_csr)
check_labels = _define_check(
    "check_labels",
    "(Tensor labels, int ignore_index, int n_classes) -> ()",
    functools.partial(check_labels_of_reference, wait_for_device=True),
)
