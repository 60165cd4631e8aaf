"""The size of the steps of the hidden values: 1 / curvature is stable, and twice that is not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lgd_kernels.arguments import check_at_least
from lgd_kernels.reference import accumulation_dtype

Gradient = Callable[[list[Tensor]], list[Tensor]]


def largest_curvature(gradient: Gradient, z: list[Tensor], *, iterations: int = 10) -> float:
    """Mean over the samples of `curvatures`; 0 where there is nothing to step: without samples or hidden values."""
    if sum(value.numel() for value in z) == 0:
        return 0.0
    return float(curvatures(gradient, z, norms_of_samples, iterations=iterations).mean())


@torch.no_grad()
def curvatures(
    gradient: Gradient, z: list[Tensor], norms: Callable[[list[Tensor]], Tensor], *, iterations: int, first: int = 0
) -> Tensor:
    """(n,): the largest eigenvalue of each sample's Hessian, by power iteration.

    gradient: z -> gradient of a sum over samples, like z. z: tensors (n, ...); sample i is row i of them all. norms:
    the Euclidean norm of each sample, of tensors like z. The Hessian's product with a direction v is the difference
    quotient of the gradient along v. first: the number of z[0] among the hidden values of the net, from 0.
    """
    check_at_least("iterations", iterations, 1)
    step = 1e-2  # a longer one meets the kinks of relu, a shorter one the rounding of the gradient
    z = [value.to(accumulation_dtype(value.dtype)) for value in z]
    v = [_first_direction(t, value) for t, value in enumerate(z, first)]
    at_z = gradient(z)
    for _ in range(iterations):
        scale = step / norms(v).clamp_min(1e-30)
        moved = gradient([value + _by_sample(scale, of_value) * of_value for value, of_value in zip(z, v, strict=True)])
        v = [(there - here) / step for there, here in zip(moved, at_z, strict=True)]
    return norms(v)


def norms_of_samples(tensors: list[Tensor]) -> Tensor:
    """(n,): the Euclidean norm of each sample's rows, over all tensors."""
    return torch.stack([tensor.flatten(1).square().sum(1) for tensor in tensors]).sum(0).sqrt()


def _first_direction(t: int, like: Tensor) -> Tensor:
    """Random, but in every call the same of hidden value t of any sample: so it does not depend on which process has
    the layer and the sample."""
    generator = torch.Generator(device="cpu").manual_seed(t)
    return torch.randn(like.shape[1:], generator=generator, device="cpu").to(like).expand_as(like)


def _by_sample(numbers: Tensor, like: Tensor) -> Tensor:
    """(n,) as (n, 1, ...)."""
    return numbers.view(-1, *(1 for _ in like.shape[1:]))
