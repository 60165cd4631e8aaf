"""Runs of tests in Triton's interpreter, in processes of their own, because a process either interprets or compiles.

They take minutes, so they start when the tests are collected and work beside the others: a test with the marker
`interpreted(*arguments)` stands for a run of pytest with these arguments and fails if it does."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONS = ("-p", "interpreter_plugin", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore::RuntimeWarning")


class InterpretedRuns:
    """A pytest plugin: one object for a session."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=2)
        self._failures: dict[str, Future[str | None]] = {}  # by test
        self._processes: list[subprocess.Popen] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.getoption("collectonly"):
            return
        for item in session.items:
            if mark := item.get_closest_marker("interpreted"):
                self._failures[item.nodeid] = self._pool.submit(self._run, mark.args)

    def pytest_unconfigure(self) -> None:
        """Without those that are not waited for, because the session was stopped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    @pytest.fixture
    def interpreted(self, request: pytest.FixtureRequest) -> None:
        """Waits for the test's run, and fails with its output if it failed."""
        if (output := self._failures[request.node.nodeid].result()) is not None:
            pytest.fail(output, pytrace=False)

    def _run(self, arguments: tuple[str, ...]) -> str | None:
        files = [HERE / argument if argument.endswith(".py") else argument for argument in arguments]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *OPTIONS, *files],
            cwd=HERE.parent,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        output, _ = process.communicate()
        return output if process.returncode != 0 else None
