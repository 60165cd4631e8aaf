"""What the machine could do at best: the time of the bytes at the rate of a copy, or of the flops at that of a GEMM.

Both rates are measured in the run that they judge: the copy as a peer between the others, the GEMM at its start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.peers import Problem
from bench.timing import CLOCKS, Timing, summarize

GEMM_OF = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}  # (size, dtype) by device


@dataclass(frozen=True)
class Rates:
    """Bytes read and written, and floating-point operations, per second."""

    bytes_per_second: float
    flops_per_second: float


def measure_gemm_rate(device: str = "cpu") -> float:
    """Flops per second of torch.mm on squares: the median of 20 calls, after 3."""
    size, dtype = GEMM_OF[device]
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator, device=device).to(dtype)
    product = torch.empty_like(a)
    seconds = [CLOCKS[device](lambda: torch.mm(a, b, out=product)) for _ in range(23)]
    return 2 * size**3 / (1e-3 * summarize(seconds[3:]).median_ms)


def copy_rate(problem: Problem, copy: Timing) -> float:
    """Bytes per second of the peer "copy"."""
    return problem.copied_bytes / (1e-3 * copy.median_ms)


def floor_ms(problem: Problem, rates: Rates) -> float:
    """Milliseconds below which no implementation gets at these rates."""
    return 1e3 * max(problem.least_bytes / rates.bytes_per_second, problem.flops / rates.flops_per_second)
