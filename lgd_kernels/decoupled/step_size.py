"""The size of the steps of the hidden values: 1 / curvature is stable, and twice that is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest_curvature(gradient: Callable[[Tensor], Tensor], z: Tensor, *, iterations: int = 10) -> float:
    """Mean over the samples of the largest eigenvalue of each sample's Hessian, by power iteration.

    gradient: z -> gradient of a sum over samples, in the shape of z. z: (T, n, d); sample i is z[:, i]. The Hessian's
    product with a direction v is the difference quotient of the gradient along v. The first direction is random but
    the same in every call.
    """
    step, at_z = 1e-2, gradient(z)  # a longer step meets the kinks of relu, a shorter one the rounding of the gradient
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    for _ in range(iterations):
        v = v / v.norm(dim=(0, 2), keepdim=True).clamp_min(1e-30)
        v = (gradient(z + step * v) - at_z) / step
    return float(v.norm(dim=(0, 2)).mean())
