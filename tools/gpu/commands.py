"""Commands that end when their time is over, with all that they print in files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu"
GRACE = 8.0  # seconds from being told to stop until being killed: for pytest to say what failed so far
_TICK, _SECONDS_PER_LINE = 0.2, 10.0


@dataclass(frozen=True)
class Ended:
    """status: its exit status; None for a command that had to be stopped. output: what it printed."""

    status: int | None
    output: str


class _Running:
    """A command in a session of its own, so that it can be stopped together with all that it has started."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str]):
        self.name, self.log, self.was_stopped = name, FOLDER / f"{name}.log", False
        self._file = self.log.open("w")
        self._process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._shown = 0

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def show(self) -> None:
        """Print what is new in the log."""
        with self.log.open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        print(new.decode(errors="replace"), end="", flush=True)
        self._shown += len(new)

    def send(self, number: signal.Signals) -> None:
        self.was_stopped = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def ended(self) -> Ended:
        status = self._process.wait()
        self._file.close()
        return Ended(None if self.was_stopped else status, self.log.read_text(errors="replace"))


def run(name: str, command: Sequence[str | Path], seconds: float, **environment: str) -> Ended:
    """Run a command for at most so many seconds and show what it prints, which is also in build/gpu/<name>.log."""
    return run_together({name: command}, seconds, show=True, **environment)[name]


def run_together(
    commands: dict[str, Sequence[str | Path]], seconds: float, show: bool = False, **environment: str
) -> dict[str, Ended]:
    """Run commands side by side for at most so many seconds; their outputs are in build/gpu/<name>.log."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    start = last_line = time.monotonic()
    running = [_Running(name, command, environment) for name, command in commands.items()]
    try:
        while any(command.is_alive() for command in running) and time.monotonic() - start < seconds - GRACE:
            time.sleep(_TICK)
            if show:
                running[0].show()
            elif time.monotonic() - last_line >= _SECONDS_PER_LINE:
                last_line = time.monotonic()
                done = sum(not command.is_alive() for command in running)
                time_used = f"{last_line - start:3.0f} s of {seconds:.0f}"
                print(f"  {time_used}: {done} of {len(running)} processes are done", flush=True)
    finally:
        _stop([command for command in running if command.is_alive()])
    if show:
        running[0].show()
    return {command.name: command.ended() for command in running}


def _stop(commands: list[_Running]) -> None:
    """Tell them to stop, as Ctrl-C does, and kill those that do not."""
    for command in commands:
        command.send(signal.SIGINT)
    patience = time.monotonic() + GRACE
    while any(command.is_alive() for command in commands) and time.monotonic() < patience:
        time.sleep(_TICK)
    for command in commands:
        command.send(signal.SIGKILL)
