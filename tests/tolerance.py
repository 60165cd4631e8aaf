"""Tolerances that are derived, not guessed.

A result may be off by twice the error that plain PyTorch makes on the same numbers, plus one rounding step of the
result's dtype. Errors are relative to the magnitude of the terms that a value is a sum of, and the error of plain
PyTorch is its largest over the whole tensor; where it happens to be exact in a handful of elements it is credited with
two rounding steps of the arithmetic, those of an exponential and of a sum, which nobody can do without.
"""

from __future__ import annotations

import numpy as np
import torch
from oracle import EXTENDED, Array, array
from torch import Tensor

_SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 5e-324}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding_step(value: Array, dtype: torch.dtype) -> Array:
    """The distance between neighbours of `dtype` around `value`."""
    return np.maximum(np.abs(value) * torch.finfo(dtype).eps, _SMALLEST[dtype])


@np.errstate(all="ignore")
def assert_accurate(
    got: Tensor, expected: Array, plain: Array, scale: Array, accumulated: torch.dtype, what: str = ""
) -> None:
    """`got` is `expected`, within the tolerance above. NaN and infinities must be where they are expected; a value
    beyond the range of got's dtype must be infinite.

    expected: extended precision; plain: of plain PyTorch in the dtype `accumulated`; scale: the magnitude of terms.
    """
    what = f"{what} " * bool(what)
    assert got.shape == expected.shape, f"{what}shape {tuple(got.shape)}, expected {expected.shape}"
    result = array(got)
    overflow = np.isfinite(expected) & (np.abs(expected) > torch.finfo(got.dtype).max)
    expected = np.where(overflow, np.copysign(np.inf, expected), expected)
    finite = np.isfinite(expected)
    special = ~finite
    np.testing.assert_array_equal(result[special], expected[special], err_msg=f"{what}where not finite")
    assert np.isfinite(result[finite]).all(), f"{what}not finite at {np.argwhere(finite & ~np.isfinite(result))[:5]}"
    if not finite.any():
        return

    arithmetic = torch.finfo(accumulated)
    result, expected, scale = result[finite], expected[finite], np.broadcast_to(scale, finite.shape)[finite]
    underflow = EXTENDED(arithmetic.tiny) * max(1, scale.max())  # subnormal numbers may be taken for 0
    own_error = np.abs(plain.astype(EXTENDED)[finite] - expected)
    own_error = np.maximum(own_error - underflow, 0) / np.maximum(scale, arithmetic.tiny)
    credit = max(own_error.max(), 2 * EXTENDED(arithmetic.eps))
    allowed = 2 * credit * scale + rounding_step(expected, got.dtype) + underflow
    excess = np.abs(result - expected) / allowed
    worst = int(excess.argmax())
    assert excess[worst] <= 1, (
        f"{what}error {float(abs(result[worst] - expected[worst])):.3g} is {float(excess[worst]):.3g} times what is "
        f"allowed at {np.argwhere(finite)[worst]}: got {float(result[worst])!r}, expected {float(expected[worst])!r}"
    )
