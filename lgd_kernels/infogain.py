"""The label-similarity matrix H as an object: H[l, j] says how right it is to answer class j when the label is l.

Only what is needed of H is stored (a number, a diagonal, a few entries per row, or all of it), and the kernels read
it by label, so that no (N, C) target ever exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lgd_kernels import ops, reference
from lgd_kernels.arguments import FLOATING, check_int, check_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class InfogainParts(NamedTuple):
    """What the ops take of H: H = matrix + background + diag(diagonal), then the stored values (CSR) take the place of
    what is there. Without any part H is the identity. A matrix excludes a background, a diagonal excludes values."""

    matrix: Tensor | None = None  # (C, C)
    background: Tensor | None = None  # ()
    diagonal: Tensor | None = None  # (C,) or ()
    crow: Tensor | None = None  # (C + 1,) int64
    col: Tensor | None = None  # (nnz,) int64
    values: Tensor | None = None  # (nnz,)


def _checked(name: str, tensor: Tensor, dim: int) -> Tensor:
    """tensor, once it is known to be a finite floating-point tensor of `dim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: dtype must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}; see Infogain.sparse")
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got {tensor.dim()} (shape {tuple(tensor.shape)})")
    ops.check_finite(tensor.detach(), name)
    return tensor


def _checked_square(name: str, matrix: Tensor) -> Tensor:
    matrix = _checked(name, matrix, dim=2)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name}: must be square (C, C), got {tuple(matrix.shape)}")
    _check_num_classes(len(matrix), name)
    return matrix


def _check_num_classes(num_classes: int, name: str = "num_classes") -> None:
    check_int(name, num_classes)
    if num_classes < 1:
        raise ValueError(f"{name}: there must be at least 1 class, got {num_classes}")


def _scalar(name: str, value: float | Tensor) -> Tensor:
    """A number as a 0-dimensional tensor, float64 unless it is a tensor already."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        value = torch.tensor(float(value), dtype=torch.float64)
    return _checked(name, value, dim=0)


class Infogain:
    """A label-similarity matrix H of shape (C, C), made by one of the constructors below.

    Tensors are kept as they are given: in their dtype, without a copy, and with their autograd history, so that H can
    be trained. H may have negative entries and rows that do not sum to 1.

    Attributes:
        kind: the constructor's name.
        num_classes: C, or None for an identity that fits any number of classes.
        parts: the stored tensors, an `InfogainParts`.
    """

    def __init__(self, kind: str, num_classes: int | None, parts: InfogainParts):
        for one, other in (("matrix", "background"), ("diagonal", "values")):
            if getattr(parts, one) is not None and getattr(parts, other) is not None:
                raise ValueError(f"parts: {one} and {other} cannot be combined; write them as one tensor")
        self.kind, self.num_classes, self.parts = kind, num_classes, parts

    @classmethod
    def identity(cls, num_classes: int | None = None) -> Infogain:
        """H = I: cross entropy."""
        if num_classes is not None:
            _check_num_classes(num_classes)
        return cls("identity", num_classes, InfogainParts())

    @classmethod
    def diagonal(cls, weight: Tensor, *, background: float | Tensor = 0.0) -> Infogain:
        """H = diag(weight) + background. With background 0 this is class weighting.

        The mean of the loss divides by the number of valid samples, where `torch.nn.CrossEntropyLoss(weight=...)`
        divides by the sum of their weights; `SoftmaxInfogainLoss(None, weight=...)` does the latter.

        weight: (C,), floating. background: a number or a 0-dimensional tensor.
        """
        weight = _checked("weight", weight, dim=1)
        _check_num_classes(len(weight), "weight")
        return cls("diagonal", len(weight), InfogainParts(diagonal=weight, background=_background(background, weight)))

    @classmethod
    def label_smoothing(cls, epsilon: float | Tensor, num_classes: int) -> Infogain:
        """H = (1 - epsilon) I + epsilon / C (Szegedy et al., 2016, arXiv:1512.00567).

        epsilon: in [0, 1] when it is a number; a 0-dimensional tensor may require grad.
        """
        if not isinstance(epsilon, Tensor):
            check_number("epsilon", epsilon)
            if not 0 <= epsilon <= 1:
                raise ValueError(f"epsilon: must be between 0 and 1, got {epsilon}")
        _check_num_classes(num_classes)
        epsilon = _scalar("epsilon", epsilon)
        parts = InfogainParts(background=epsilon / num_classes, diagonal=1 - epsilon)
        return cls("label_smoothing", num_classes, parts)

    @classmethod
    def sparse(cls, matrix: Tensor, *, background: float | Tensor = 0.0) -> Infogain:
        """H given by its stored entries; every entry that is not stored equals `background`.

        The cost of the loss does not depend on the number of stored entries per row while that is far below C.

        matrix: (C, C), a sparse tensor (CSR, or any layout that converts to COO) or a dense one, whose non-zero
        entries are then the stored ones. Raises ValueError for indices out of range or repeated in a row.
        """
        if not isinstance(matrix, Tensor):
            raise TypeError(f"matrix: expected a torch.Tensor, got {type(matrix).__name__}")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: must be square (C, C), got {tuple(matrix.shape)}")
        num_classes = matrix.shape[0]
        _check_num_classes(num_classes, "matrix")
        if matrix.layout == torch.sparse_coo and matrix.dense_dim() > 0:
            raise ValueError(f"matrix: must store numbers, got a hybrid tensor with dense_dim {matrix.dense_dim()}")
        if matrix.layout == torch.sparse_csr:
            crow, col = matrix.crow_indices().detach().to(torch.int64), matrix.col_indices().detach().to(torch.int64)
        else:  # not by way of a CSR tensor, which warns that it is in beta
            matrix = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()).coalesce()
            row, col = matrix.indices().detach()
            crow = torch.searchsorted(row.contiguous(), torch.arange(num_classes + 1, device=row.device))
        values = _checked("matrix", matrix.values(), dim=1)
        if not values.requires_grad:
            values = values.detach()  # no longer a view of the sparse tensor, which compilers cannot trace
        ops.check_csr(crow, col, num_classes)
        parts = InfogainParts(crow=crow, col=col, values=values, background=_background(background, values))
        return cls("sparse", num_classes, parts)

    @classmethod
    def dense(cls, matrix: Tensor) -> Infogain:
        """H = matrix, (C, C), floating. Kept without a copy: a change in place is a change of H."""
        matrix = _checked_square("matrix", matrix)
        return cls("dense", len(matrix), InfogainParts(matrix=matrix))

    @classmethod
    def from_distance(cls, distance: Tensor, *, beta: float = 4.0, top_k: int | None = None) -> Infogain:
        """H[l, j] = exp(-beta D[l, j] / max D), each row then divided by its sum.

        The distance says how bad it is to answer j for l; beta how fast similarity falls off with it (Bertinetto et
        al., 2020, arXiv:1912.09393, "soft labels").

        distance: (C, C), floating, not negative, with 0 where two classes are equal. beta: finite, not negative.
        top_k: keep only the k most similar classes of each row, before the rows are normalized, and store them
        sparsely.
        """
        check_number("beta", beta)
        if beta < 0:
            raise ValueError(f"beta: must not be negative, got {beta}")
        distance = _checked_square("distance", distance)
        ops.check_not_negative(distance.detach(), "distance")
        similarity = torch.exp(-beta * distance / distance.max().clamp_min(torch.finfo(distance.dtype).tiny))
        if top_k is None:
            return cls.dense(similarity / similarity.sum(1, keepdim=True))
        num_classes = len(distance)
        check_int("top_k", top_k)
        if not 1 <= top_k <= num_classes:
            raise ValueError(f"top_k: must be between 1 and the number of classes {num_classes}, got {top_k}")
        kept, col = similarity.topk(top_k, dim=1)
        col, order = col.sort(dim=1)
        kept = kept.gather(1, order)
        values = (kept / kept.sum(1, keepdim=True)).flatten()
        crow = torch.arange(num_classes + 1, device=distance.device) * top_k
        return cls("sparse", num_classes, InfogainParts(crow=crow, col=col.flatten(), values=values))

    def to(self, device: torch.device | str) -> Infogain:
        """The same H with its tensors on `device`."""
        moved = (None if part is None else part.to(device) for part in self.parts)
        return Infogain(self.kind, self.num_classes, InfogainParts(*moved))

    def to_dense(self, num_classes: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """H as a (C, C) tensor of `dtype`. num_classes is needed only for an identity made without one."""
        num_classes = self.num_classes if num_classes is None else num_classes
        if num_classes is None:
            raise ValueError("num_classes: this identity was made without a number of classes; give one")
        if self.num_classes is not None and self.num_classes != num_classes:
            raise ValueError(f"num_classes: is {num_classes}, but H is for {self.num_classes} classes")
        device = next((part.device for part in self.parts if part is not None), None)
        labels = torch.arange(num_classes, device=device).unsqueeze(1)  # (C, 1): C outer rows, 1 inner
        return reference.infogain_rows(labels, num_classes, *self.parts, dtype=dtype).squeeze(2)

    def plot(self, ax: Axes | None = None, *, class_names: list[str] | None = None) -> Axes:
        """Draw H as a picture, one row per label, and return the axes. Needs matplotlib."""
        import matplotlib.pyplot as plt

        picture = self.to_dense().detach().cpu()
        if ax is None:
            _, ax = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
        smallest, largest = float(picture.min()), float(picture.max())
        colors = {"cmap": "viridis", "vmin": min(smallest, 0.0), "vmax": largest}
        if smallest < 0:
            bound = max(-smallest, largest)
            colors = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
        image = ax.imshow(picture.numpy(), **colors)
        ax.figure.colorbar(image, ax=ax, label="H[label, class]")
        ax.set(title=f"{self.kind} infogain, {len(picture)} classes", xlabel="class", ylabel="label")
        if len(picture) <= 30:
            names = [str(i) for i in range(len(picture))] if class_names is None else class_names
            ax.set_xticks(range(len(picture)), names, rotation=90 if max(map(len, names)) > 2 else 0)
            ax.set_yticks(range(len(picture)), names)
        return ax

    def __repr__(self) -> str:
        stored = ", ".join(
            f"{name}={tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}"
            for name, part in self.parts._asdict().items()
            if part is not None
        )
        return f"Infogain.{self.kind}(num_classes={self.num_classes}{', ' if stored else ''}{stored})"


def _background(background: float | Tensor, beside: Tensor) -> Tensor | None:
    """The background as a part; none at all when it is the number 0."""
    if not isinstance(background, Tensor) and background == 0:
        return None
    return _scalar("background", background).to(beside.device)
