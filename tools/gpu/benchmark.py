"""Runs the benchmark of the device."""

from __future__ import annotations

import re
import sys

from tools.gpu.commands import Ended, run
from tools.gpu.stages import FAILED, PASSED, STOPPED, Outcome


def command(quick: bool) -> list[str]:
    """`python -m bench` on the device; in a quick run the few workloads in float32."""
    return [sys.executable, "-m", "bench", "--device", "cuda", *(["--quick", "--only", "float32"] if quick else [])]


def benchmark(seconds: float, quick: bool) -> Outcome:
    return judged(run("bench", command(quick), seconds))


def judged(ended: Ended) -> Outcome:
    """What the benchmark says of itself; it writes its results as it goes."""
    goals = re.search(r"^\d+ of \d+ goals met$", ended.output, re.MULTILINE)
    missing = len(re.findall(r"^not (?:measured|timed): ", ended.output, re.MULTILINE))
    details = [goals[0]] if goals else []
    details += [f"{missing} not measured"] if missing else []
    details = ", ".join([*details, "see build/gpu/bench.log"])
    if ended.status is None:
        return Outcome(STOPPED, details)
    return Outcome(PASSED if ended.status == 0 else FAILED, details)
