"""Runs the tests on the device, in as many processes as there are cores."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec

from tools.gpu.commands import Ended, run_together
from tools.gpu.stages import FAILED, PASSED, STOPPED, Outcome

MOST_PROCESSES = 16  # each has a CUDA context of half a gigabyte
NOTHING_COLLECTED = 5  # exit status of pytest
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")


def commands(processes: int, quick: bool) -> dict[str, list[str]]:
    """One pytest for each share of the tests."""
    common = [sys.executable, "-m", "pytest", "-p", "tools.gpu.pytest_plugin", "-p", "no:cacheprovider"]
    common += ["--device=cuda", "--tb=short", "-rfE", *(["--quick"] if quick else [])]
    return {f"tests-{i:02}": [*common, f"--share={i}/{processes}"] for i in range(1, processes + 1)}


def tests(seconds: float, quick: bool) -> Outcome:
    """The whole suite; in a quick run every value of every parameter once."""
    if missing := [name for name in ("pytest", "hypothesis", "numpy") if find_spec(name) is None]:
        return Outcome(FAILED, f"not installed: {', '.join(missing)}")
    ended = run_together(commands(min(os.cpu_count() or 1, MOST_PROCESSES), quick), seconds)
    for line in failures(ended.values())[:20]:
        print(line)
    return judged(ended.values())


def failures(ended: Iterable[Ended]) -> list[str]:
    """The lines in which pytest names what failed."""
    return [line for e in ended for line in e.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def counts(output: str) -> Counter[str]:
    """How many tests passed, failed and so on: of the last line in which pytest says so."""
    summaries = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = _COUNTS.findall(summaries[-1]) if summaries else []
    return Counter({word.removesuffix("s") if word == "errors" else word: int(number) for number, word in found})


def judged(ended: Iterable[Ended]) -> Outcome:
    """One outcome for all shares."""
    ended = list(ended)
    total: Counter[str] = sum((counts(e.output) for e in ended), Counter())
    details = ", ".join(f"{total[word]} {word}" for word in ("passed", "failed", "error", "skipped") if total[word])
    details = f"{details or 'no test ended'}; see build/gpu/tests-*.log"
    if total["failed"] or total["error"] or any(e.status not in (0, None, NOTHING_COLLECTED) for e in ended):
        return Outcome(FAILED, details)
    unfinished = sum(e.status is None for e in ended)
    if unfinished:
        return Outcome(STOPPED, f"{details}; {unfinished} of {len(ended)} processes were not done")
    return Outcome(PASSED if total["passed"] else FAILED, details)
