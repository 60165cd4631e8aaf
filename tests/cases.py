"""The kinds of H and the memory layouts that the tests run over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import lgd_kernels as lgd
from lgd_kernels.infogain import InfogainParts

Infogain = lgd.Infogain
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "mean")
NORMALIZATIONS = (None, "full", "valid", "batch_size", "none")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------------
# H: each function returns (the object, the same matrix in float64, dense, made independently)
# ---------------------------------------------------------------------------------------------------------------------


def _identity(C):
    return Infogain.identity(), torch.eye(C, dtype=torch.float64)


def _none(C):
    return None, _identity(C)[1]


def _diagonal(C):
    weight = torch.rand(C) * 3
    return Infogain.diagonal(weight), weight.double().diag()


def _diagonal_background(C):
    weight = torch.rand(C, dtype=torch.float64) * 3
    return Infogain.diagonal(weight, background=0.25), weight.diag() + 0.25


def _label_smoothing(C):
    dense = torch.full((C, C), 0.1 / C, dtype=torch.float64)
    return Infogain.label_smoothing(0.1, C), dense.fill_diagonal_(0.9 + 0.1 / C)


def _stored_entries(C):
    """About three stored entries in a row, one row without any, one full, one entry a stored 0."""
    stored = torch.rand(C, C) < 3 / C
    stored[0], stored[C // 2], stored[C - 1, C - 1] = False, True, True
    values = torch.randn(C, C)
    values[C - 1, C - 1] = 0
    return stored, values


def _sparse(C, background=0.0):
    stored, values = _stored_entries(C)
    rows, cols = stored.nonzero(as_tuple=True)
    sparse = torch.sparse_coo_tensor(torch.stack([rows, cols]), values[stored], (C, C), check_invariants=True)
    return Infogain.sparse(sparse, background=background), torch.where(stored, values.double(), background)


def _sparse_background(C):
    return _sparse(C, background=-0.125)


def _dense(dtype):
    def make(C):
        matrix = torch.rand(C, C).to(dtype)
        return Infogain.dense(matrix), matrix.double()

    return make


def _dense_negative(C):
    matrix = torch.randn(C, C)
    return Infogain.dense(matrix), matrix.double()


def _dense_large_row_sums(C):
    """s_l between 30 and 60, and another in every row."""
    matrix = torch.rand(C, C) * (2 * 30 / C) + 30 / C * torch.rand(C, 1) + 10 / C
    return Infogain.dense(matrix), matrix.double()


def _dense_zero_row_sums(C):
    matrix = torch.randint(-3, 4, (C, C)).float()
    matrix[:, 0] -= matrix.sum(1)
    return Infogain.dense(matrix), matrix.double()


def _dense_transposed(C):
    matrix = torch.rand(C, C).T
    return Infogain.dense(matrix), matrix.double()


def _dense_one_row_for_all(C):
    matrix = torch.rand(C).expand(C, C)
    return Infogain.dense(matrix), matrix.double()


def _diagonal_strided(C):
    weight = torch.rand(C, 3)[:, 1]
    return Infogain.diagonal(weight), weight.double().diag()


def _dense_with_diagonal(C):
    """As `SoftmaxInfogainLoss` stores class weights with label smoothing."""
    matrix, diagonal = torch.rand(C).expand(C, C), torch.rand(C)
    H = Infogain("mine", C, InfogainParts(matrix=matrix, diagonal=diagonal))
    return H, matrix.double() + diagonal.double().diag()


def _dense_with_stored_values(C):
    stored, values = _stored_entries(C)
    sparse, matrix = torch.where(stored, values, 0).to_sparse(), torch.rand(C, C)
    H = Infogain("mine", C, Infogain.sparse(sparse).parts._replace(matrix=matrix))
    return H, torch.where(stored & (values != 0), values, matrix).double()


def _from_distance(C):
    position = torch.arange(C, dtype=torch.float64)
    distance = (position[:, None] - position).abs()
    similarity = torch.exp(-4 * distance / max(C - 1, 1))
    return Infogain.from_distance(distance), similarity / similarity.sum(1, keepdim=True)


KINDS: dict[str, Callable[[int], tuple[Infogain | None, Tensor]]] = {
    "none": _none,
    "identity": _identity,
    "diagonal": _diagonal,
    "diagonal_background": _diagonal_background,
    "diagonal_strided": _diagonal_strided,
    "label_smoothing": _label_smoothing,
    "sparse": _sparse,
    "sparse_background": _sparse_background,
    "dense_float32": _dense(torch.float32),
    "dense_bfloat16": _dense(torch.bfloat16),
    "dense_float16": _dense(torch.float16),
    "dense_float64": _dense(torch.float64),
    "dense_negative": _dense_negative,
    "dense_large_row_sums": _dense_large_row_sums,
    "dense_zero_row_sums": _dense_zero_row_sums,
    "dense_transposed": _dense_transposed,
    "dense_one_row_for_all": _dense_one_row_for_all,
    "dense_with_diagonal": _dense_with_diagonal,
    "dense_with_stored_values": _dense_with_stored_values,
    "from_distance": _from_distance,
}
# one of each way in which the kernels read H
SOME_KINDS = ("none", "diagonal_background", "sparse_background", "dense_negative")

# ---------------------------------------------------------------------------------------------------------------------
# Layouts: each function turns logits in memory of their own (class axis 1) into (logits, class axis)
# ---------------------------------------------------------------------------------------------------------------------


def _in_larger(x: Tensor, larger: Callable[[Tensor], Tensor], view: Callable[[Tensor], Tensor]) -> Tensor:
    """x's values in a view of a larger tensor that holds NaN elsewhere."""
    out = view(larger(x).fill_(torch.nan))
    return out.copy_(x)


def _two_dimensional(N, C, dtype):
    return (torch.randn(N, C) * 3).to(dtype)


def _strided_classes(N, C, dtype):
    x = _two_dimensional(N, C, dtype)
    return _in_larger(x, lambda x: x.new_empty(N, 2 * C), lambda y: y[:, ::2]), 1


def _padded_rows(N, C, dtype):
    x = _two_dimensional(N, C, dtype)
    return _in_larger(x, lambda x: x.new_empty(N, C + 5), lambda y: y[:, 3 : 3 + C]), 1


def _every_second_row(N, C, dtype):
    x = _two_dimensional(N, C, dtype)
    return _in_larger(x, lambda x: x.new_empty(2 * N, C), lambda y: y[1::2]), 1


def _offset(N, C, dtype):
    x = _two_dimensional(N, C, dtype)
    return _in_larger(x, lambda x: x.new_empty(1 + N * C), lambda y: y[1:].view(N, C)), 1


def _four_dimensional(N, C, dtype):
    return (torch.randn(N, C, 2, 3) * 3).to(dtype)


LAYOUTS: dict[str, Callable[[int, int, torch.dtype], tuple[Tensor, int]]] = {
    "N_C": lambda N, C, dtype: (_two_dimensional(N, C, dtype), 1),
    "N_C_d": lambda N, C, dtype: ((torch.randn(N, C, 3) * 3).to(dtype), 1),
    "N_C_d_d": lambda N, C, dtype: (_four_dimensional(N, C, dtype), 1),
    "N_d_C": lambda N, C, dtype: ((torch.randn(N, 2, C) * 3).to(dtype), -1),
    "C_N": lambda N, C, dtype: ((torch.randn(C, N) * 3).to(dtype), 0),
    "C_N_d": lambda N, C, dtype: ((torch.randn(C, N, 2) * 3).to(dtype), -3),
    "unbatched": lambda N, C, dtype: ((torch.randn(C) * 3).to(dtype), 1),
    "transposed": lambda N, C, dtype: (_two_dimensional(C, N, dtype).T, 1),
    "strided_classes": _strided_classes,
    "padded_rows": _padded_rows,
    "every_second_row": _every_second_row,
    "offset": _offset,
    "one_row_expanded": lambda N, C, dtype: (_two_dimensional(1, C, dtype).expand(N, C), 1),
    "one_class_expanded": lambda N, C, dtype: (_two_dimensional(N, 1, dtype).expand(N, C), 1),
    "channels_last": lambda N, C, dtype: (_four_dimensional(N, C, dtype).to(memory_format=torch.channels_last), 1),
    "inner_transposed": lambda N, C, dtype: (_four_dimensional(N, C, dtype).transpose(2, 3), 1),
    "inner_expanded": lambda N, C, dtype: ((torch.randn(N, C, 1) * 3).to(dtype).expand(N, C, 4), 1),
    "batch_expanded": lambda N, C, dtype: ((torch.randn(1, 2, C) * 3).to(dtype).expand(N, 2, C), 2),
}


def make_labels(logits: Tensor, axis: int) -> Tensor:
    """Random labels in the shape of the logits without the class axis."""
    axis = 0 if logits.dim() == 1 else axis % logits.dim()
    return torch.randint(logits.shape[axis], (*logits.shape[:axis], *logits.shape[axis + 1 :]))
