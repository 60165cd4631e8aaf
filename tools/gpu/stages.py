"""Stages, one after the other, each with a limit of time; what is known of them is on disk after every one."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PASSED, FAILED, SKIPPED, STOPPED = "passed", "FAILED", "skipped", "STOPPED"
_TOO_LITTLE = 12.0  # seconds in which no stage gets anywhere


@dataclass(frozen=True)
class Outcome:
    """result: one of the four words above. details: a line for the table."""

    result: str
    details: str


@dataclass(frozen=True)
class Stage:
    """seconds: what it may take at most. run: does it, within the seconds that it is given."""

    name: str
    seconds: float
    run: Callable[[float], Outcome]


@dataclass(frozen=True)
class Finished:
    name: str
    outcome: Outcome
    seconds: float


def run_stages(
    stages: Iterable[Stage], seconds: float, summary: Path, clock: Callable[[], float] = time.monotonic
) -> list[Finished]:
    """Run the stages in at most so many seconds together. Ctrl-C ends the one that runs and leaves out the rest."""
    finished: list[Finished] = []
    start, interrupted = clock(), False
    for stage in stages:
        left = seconds - (clock() - start)
        began = clock()
        if interrupted or left < _TOO_LITTLE:
            outcome = Outcome(STOPPED, "interrupted" if interrupted else "no time was left")
        else:
            print(f"\n=== {stage.name}: at most {min(stage.seconds, left):.0f} s", flush=True)
            try:
                outcome = stage.run(min(stage.seconds, left))
            except KeyboardInterrupt:
                outcome, interrupted = Outcome(STOPPED, "interrupted"), True
            except Exception as error:
                print(traceback.format_exc())
                outcome = Outcome(FAILED, f"the stage itself: {type(error).__name__}: {error}")
        finished.append(Finished(stage.name, outcome, clock() - began))
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(table(finished) + "\n", encoding="utf-8")
    return finished


def table(finished: Iterable[Finished]) -> str:
    """One line for each stage."""
    lines = [f"{'stage':20}{'result':9}{'seconds':>8}   details"]
    lines += [f"{f.name:20}{f.outcome.result:9}{f.seconds:8.0f}   {f.outcome.details}" for f in finished]
    return "\n".join(lines)


def succeeded(finished: Iterable[Finished]) -> bool:
    """Whether nothing failed and nothing was stopped."""
    return all(f.outcome.result in (PASSED, SKIPPED) for f in finished)
