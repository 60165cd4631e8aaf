"""Processes that die by SIGKILL at a chosen moment, and cheaply: they are forks of a server that has imported torch."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from lgd_kernels.decoupled import files

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "lgd_kernels"])  # optimizers import torch._dynamo: 1.5 s
ON_FILES = ("write", "fsync", "replace", "replaced")  # the moments of files.save, in their order

Report = Callable[[str], None]


class Moment(NamedTuple):
    """The `count`-th time that a process reports `what`."""

    what: str
    count: int


def run(function: Callable, *args, kill_at: Moment | None = None) -> bool:
    """Call function(report, *args) in a process of its own; whether it was killed before it was done.

    It reports what it does, by names. At one of ON_FILES it is killed just there. At any other name it goes on while
    the signal is on its way, so that it dies wherever it has come to.
    """
    ours, its = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_live, args=(its, kill_at, function, args))
    process.start()
    its.close()
    try:
        ours.recv()  # the moment has come,
        process.kill()
    except EOFError:  # or the process has ended without
        pass
    process.join()
    ours.close()
    assert process.exitcode in (0, -signal.SIGKILL), f"the process ended with {process.exitcode}"
    return process.exitcode != 0


def _live(connection: Connection, kill_at: Moment | None, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    seen = Counter()

    def report(what: str) -> None:
        seen[what] += 1
        if Moment(what, seen[what]) == kill_at:
            connection.send(what)
            if what in ON_FILES:
                signal.pause()

    _report_files(report)
    function(report, *args)


def _report_files(report: Report) -> None:
    """Report what files.save does to files. A write is reported when half of it is done."""

    class File(io.FileIO):
        def write(self, data) -> int:
            data = memoryview(data).cast("B")
            half = super().write(data[: len(data) // 2])
            report("write")
            return half + super().write(data[len(data) // 2 :])

    fsync, replace = os.fsync, os.replace

    def reported_fsync(descriptor: int) -> None:
        report("fsync")
        fsync(descriptor)

    def reported_replace(old: str, new: str) -> None:
        report("replace")
        replace(old, new)
        report("replaced")

    files.open, os.fsync, os.replace = File, reported_fsync, reported_replace
