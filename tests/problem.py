"""One call of the loss together with what it must return."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from oracle import EXTENDED, array, rows_of
from tolerance import accumulation_dtype, assert_accurate
from torch import Tensor

import lgd_kernels as lgd


@dataclass
class Problem:
    """The arguments of `softmax_infogain_loss`, with H also as a dense float64 matrix, and the checks of its results.

    A gradient is checked for the `upstream` gradient of the loss: a number for a reduced loss, else a tensor in the
    shape of the labels.
    """

    logits: Tensor
    labels: Tensor
    H: lgd.Infogain | None
    dense: Tensor
    axis: int = 1
    sample_weight: Tensor | None = None
    ignore_index: int = -100
    z_loss: float = 0.0

    def loss(self, logits: Tensor | None = None, **options: Any):
        return lgd.softmax_infogain_loss(
            self.logits if logits is None else logits,
            self.labels,
            self.H,
            axis=self.axis,
            sample_weight=self.sample_weight,
            ignore_index=self.ignore_index,
            z_loss=self.z_loss,
            **options,
        )

    @property
    def class_axis(self) -> int:
        return 0 if self.logits.dim() == 1 else self.axis % self.logits.dim()

    @property
    def accumulated(self) -> torch.dtype:
        return accumulation_dtype(self.logits.dtype)

    @functools.cached_property
    def exact(self) -> oracle.Rows:
        weight = None if self.sample_weight is None else array(self.sample_weight).reshape(-1)
        options = {"weight": weight, "ignore_index": self.ignore_index, "z_loss": self.z_loss}
        x = array(rows_of(self.logits, self.class_axis))
        return oracle.softmax_infogain(x, array(self.labels).reshape(-1), array(self.dense), **options)

    @functools.cached_property
    def plain(self) -> oracle.Rows:
        weight = None if self.sample_weight is None else self.sample_weight.reshape(-1)
        options = {"weight": weight, "ignore_index": self.ignore_index, "z_loss": self.z_loss}
        x = rows_of(self.logits, self.class_axis)
        return oracle.plain_softmax_infogain(x, self.labels.reshape(-1), self.dense, **options)

    def denominator(self, normalization: str | None) -> int:
        return oracle.denominator(self.labels, self.class_axis, self.ignore_index, normalization)

    def upstream_of_rows(self, upstream: float | Tensor, reduction: str, normalization: str | None = None):
        """The upstream gradient of every row's loss."""
        if isinstance(upstream, Tensor):
            return array(upstream).reshape(-1)
        scale = EXTENDED(upstream)
        if reduction == "mean":
            scale = scale / EXTENDED(self.denominator(normalization))
        return np.full(self.labels.numel(), scale)

    def assert_per_row(self, got: Tensor, name: str) -> None:
        """A result in the shape of the labels: loss, lse or norm."""
        assert got.shape == self.labels.shape
        scale = {
            "loss": self.exact.loss_scale,
            "lse": self.exact.lse_scale,
            "norm": np.sqrt((self.exact.grad_scale**2).sum(1)),
        }[name]
        exact, plain = getattr(self.exact, name), getattr(self.plain, name)
        assert_accurate(got.reshape(-1), exact, plain, scale, self.accumulated, name)

    @np.errstate(all="ignore")
    def assert_loss(self, got: Tensor, reduction: str = "mean", normalization: str | None = None) -> None:
        if reduction == "none":
            self.assert_per_row(got, "loss")
            return
        by = EXTENDED(self.denominator(normalization) if reduction == "mean" else 1)
        exact, plain = self.exact.loss.sum() / by, np.asarray(self.plain.loss.sum() / self.plain.loss.dtype.type(by))
        assert_accurate(got, exact, plain, self.exact.loss_scale.sum() / by, self.accumulated, f"{reduction} loss")

    def assert_rows(self, got: Tensor, exact, plain, scale, what: str) -> None:
        """A result in the shape of the logits."""
        assert got.shape == self.logits.shape
        assert_accurate(rows_of(got, self.class_axis), exact, plain, scale, self.accumulated, what)

    @np.errstate(all="ignore")
    def assert_grad(
        self,
        got: Tensor,
        upstream: float | Tensor = 1.0,
        reduction: str = "mean",
        normalization: str | None = None,
        upstream_of_lse: Tensor | None = None,
    ) -> None:
        assert got.dtype == self.logits.dtype
        up = self.upstream_of_rows(upstream, reduction, normalization)[:, None]
        up = np.where(self.exact.kept[:, None], up, 0)
        plain_up = up.astype(self.plain.grad.dtype)
        exact, plain, scale = up * self.exact.grad, plain_up * self.plain.grad, np.abs(up) * self.exact.grad_scale
        if upstream_of_lse is not None:
            up = array(upstream_of_lse).reshape(-1, 1)
            exact, plain = exact + up * self.exact.p, plain + up.astype(plain.dtype) * self.plain.p
            scale = scale + np.abs(up) * self.exact.p_scale
        self.assert_rows(got, exact, plain, scale, "gradient")

    def check(self, reduction: str = "mean", normalization: str | None = None) -> None:
        """Loss and gradient of the logits; for reduction "none" with an upstream gradient of its own for every row."""
        logits = self.logits.detach().requires_grad_()
        loss = self.loss(logits, reduction=reduction, normalization=normalization)
        self.assert_loss(loss, reduction, normalization)
        upstream = torch.randn_like(loss) if reduction == "none" else torch.ones_like(loss)
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        self.assert_grad(grad, upstream if reduction == "none" else 1.0, reduction, normalization)
