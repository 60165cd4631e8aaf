"""Checks of arguments that all losses share, with messages that name the argument and what was given."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_LARGEST = sys.float_info.max
_INT64 = range(-(2**63), 2**63)


def check_number(name: str, value: float) -> None:
    """Raise TypeError unless value is an int or a float, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {_described(value)}")
    if not -_LARGEST <= value <= _LARGEST:  # math.isfinite cannot be traced for a dynamic number
        raise ValueError(f"{name}: must be finite, got {'an int beyond floats' if isinstance(value, int) else value}")


def check_not_negative(name: str, value: float) -> None:
    """The same, and raise ValueError for a negative number."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}: must not be negative, got {value}")


def check_int(name: str, value: int) -> None:
    """Raise TypeError unless value is an int (and not a bool), ValueError unless 64 bits hold it."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {_described(value)}")
    if isinstance(value, int) and value not in _INT64:
        raise ValueError(f"{name}: must fit 64 bits, got {value}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise TypeError unless value is an int, ValueError unless it is that large."""
    check_int(name, value)
    if value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


def check_bool(name: str, value: bool) -> None:
    """Raise TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {_described(value)}")


def one_of(name: str, value: str, valid: Sequence[str]) -> int:
    """The position of value in valid. Raises ValueError if it is not there."""
    if value not in valid:
        raise ValueError(f"{name}: unknown value {value!r}; choose one of {', '.join(map(repr, valid))}")
    return valid.index(value)


def _described(value: object) -> str:
    kind = type(value).__name__
    return f"{kind} {value!r}" if isinstance(value, (str, int, float)) else kind
