"""`python -m tools.gpu`: build, tests, compute-sanitizer and benchmark on this machine's CUDA device; then a table."""

from __future__ import annotations

import argparse
import functools
import math
import signal
import sys

from tools.gpu.benchmark import benchmark
from tools.gpu.build import build
from tools.gpu.commands import FOLDER
from tools.gpu.sanitizer import sanitizer
from tools.gpu.stages import Stage, run_stages, succeeded, table
from tools.gpu.tests import tests

FULL_SECONDS, QUICK_SECONDS = 520.0, 165.0  # of all stages together


def stages(quick: bool) -> list[Stage]:
    """What is run, in this order; the last one gets all the time that is left."""
    the_tests, the_benchmark = functools.partial(tests, quick=quick), functools.partial(benchmark, quick=quick)
    if quick:
        return [Stage("build", 95, build), Stage("tests", 40, the_tests), Stage("benchmark", math.inf, the_benchmark)]
    return [
        Stage("build", 130, build),
        Stage("tests", 140, the_tests),
        Stage("compute-sanitizer", 80, sanitizer),
        Stage("benchmark", math.inf, the_benchmark),
    ]


def why_not(target: str = "make gpu") -> str | None:
    """Why a target that needs a GPU cannot be made here; None if it can."""
    try:
        import torch
    except ImportError as error:
        return f"{target} needs torch in {sys.executable}: {error}"
    if not torch.cuda.is_available():
        return f"{target} needs a CUDA device, and torch {torch.__version__} sees none on this machine"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu",
        description="Build, test and measure on this machine's CUDA device, with the packages that this Python has; "
        "nothing is installed. Logs and a summary go to build/gpu, results to bench/results.",
        epilog="exit status: 0 if nothing failed and nothing was stopped",
    )
    parser.add_argument("--quick", action="store_true", help="under 3 minutes instead of 9: fewer tests, fewer times")
    quick = parser.parse_args().quick
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what it has started must not live on
    finished = run_stages(stages(quick), QUICK_SECONDS if quick else FULL_SECONDS, FOLDER / "summary.txt")
    print(f"\n{table(finished)}")
    return 0 if succeeded(finished) else 1


if __name__ == "__main__":
    sys.exit(main())
