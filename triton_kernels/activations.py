"""Activations and hidden losses with their derivatives: the equations of lgd_kernels/reference/activations.py, by the
codes of its lists. NaN goes through all of them."""

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
RELU = tl.constexpr(1)
TANH = tl.constexpr(2)
SCALED_TANH = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
SILU = tl.constexpr(5)
GELU = tl.constexpr(6)
GELU_TANH = tl.constexpr(7)
LEAKY_RELU = tl.constexpr(8)
SQUARED = tl.constexpr(0)
HUBER = tl.constexpr(1)

LEAKY_SLOPE = tl.constexpr(0.01)
TANH_SCALE, TANH_STRETCH = tl.constexpr(1.7159), tl.constexpr(2 / 3)  # LeCun et al., "Efficient BackProp", 1998
GELU_STRETCH, GELU_CUBIC = tl.constexpr(0.79788456080286536), tl.constexpr(0.044715)  # sqrt(2 / pi); arXiv:1606.08415
SQRT_HALF, INVERSE_SQRT_TWO_PI = tl.constexpr(0.70710678118654752), tl.constexpr(0.39894228040143268)


@triton.jit
def tanh_of_small(x):
    """tanh(x) for |x| < 0.625, where (1 - t) / (1 + t) cancels: Cephes' tanhf and tanh."""
    square = x * x
    if x.dtype == tl.float64:
        p = (square * -0.964399179425052238628 - 99.2877231001918586564) * square - 1614.68768441708447952
        q = (
            (square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3
        ) * square + 4.84406305325125486048e3
        p = p / q
    else:
        p = (square * -5.70498872745e-3 + 2.06390887954e-2) * square - 5.37397155531e-2
        p = (p * square + 1.33314422036e-1) * square - 3.33332819422e-1
    return x + x * square * p


@triton.jit
def tanh_with_slope(x):
    """(tanh(x), 1 - tanh(x)^2), both without cancellation."""
    t = tl.exp(-2 * tl.abs(x))
    inverse = 1 / (1 + t)
    large, small = (1 - t) * inverse, tanh_of_small(x)
    is_small = tl.abs(x) < 0.625
    y = tl.where(is_small, small, tl.where(x < 0, -large, large))
    return y, tl.where(is_small, (1 - small) * (1 + small), 4 * t * inverse * inverse)


@triton.jit
def step(x):
    """1 for x > 0, 0 for x <= 0, NaN for NaN."""
    return tl.where(x > 0, tl.zeros_like(x) + 1, tl.where(x <= 0, tl.zeros_like(x), x))


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both without cancellation."""
    t = tl.exp(-tl.abs(x))
    larger = 1 / (1 + t)
    smaller = t * larger
    return tl.where(x > 0, larger, smaller), tl.where(x > 0, smaller, larger)


@triton.jit
def activated(x, CODE: tl.constexpr):
    """(f(x), f'(x)); at the kink of relu and leaky_relu the derivative from below."""
    if CODE == IDENTITY:
        return x, tl.zeros_like(x) + 1
    elif CODE == RELU:
        return tl.where(x <= 0, tl.zeros_like(x), x), step(x)
    elif CODE == TANH:
        return tanh_with_slope(x)
    elif CODE == SCALED_TANH:
        y, slope = tanh_with_slope(x * TANH_STRETCH)
        return y * TANH_SCALE, slope * (TANH_SCALE * TANH_STRETCH)
    elif CODE == SIGMOID:
        sigma, of_minus = sigmoids(x)
        return sigma, sigma * of_minus
    elif CODE == SILU:
        sigma, of_minus = sigmoids(x)
        return x * sigma, sigma * (1 + x * of_minus)
    elif CODE == GELU:
        below = 0.5 * (1 + tl.erf(x * SQRT_HALF))
        return x * below, below + x * (tl.exp(-0.5 * x * x) * INVERSE_SQRT_TWO_PI)
    elif CODE == GELU_TANH:
        square = x * x
        y, slope = tanh_with_slope(x * GELU_STRETCH * (1 + square * GELU_CUBIC))
        slope *= (1 + square * (3 * GELU_CUBIC)) * GELU_STRETCH
        return 0.5 * x * (1 + y), 0.5 * (1 + y) + 0.5 * x * slope
    else:
        tl.static_assert(CODE == LEAKY_RELU)
        slope = step(x) * (1 - LEAKY_SLOPE) + LEAKY_SLOPE
        return x * slope, slope


@triton.jit
def hidden_loss(e, kappa, CODE: tl.constexpr):
    """(L(e), L'(e)): e^2 / 2, or Huber's, linear beyond +-kappa."""
    if CODE == SQUARED:
        return 0.5 * e * e, e
    else:
        tl.static_assert(CODE == HUBER)
        slope = tl.where(e > kappa, kappa, tl.where(e < -kappa, -kappa, e))
        return slope * (e - 0.5 * slope), slope
