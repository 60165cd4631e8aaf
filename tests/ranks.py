"""The ranks of a job of torch.distributed, as processes of this machine that talk by gloo over loopback."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from killed import CONTEXT


class Ended(NamedTuple):
    """What became of a rank."""

    result: Any  # None if it failed or died
    error: str  # of its exception, or ""
    exitcode: int


def run(job: Callable, n_ranks: int, folder: Path, *args, timeout: float = 60.0) -> list[Any]:
    """job(*args) on every rank of one process group; the results by rank."""
    ended = run_to_any_end(job, n_ranks, folder, *args, timeout=timeout)
    for rank, (_, error, exitcode) in enumerate(ended):
        assert exitcode == 0, f"rank {rank} ended with {exitcode}: {error}"
    return [result for result, _, _ in ended]


def run_to_any_end(job: Callable, n_ranks: int, folder: Path, *args, timeout: float) -> list[Ended]:
    """The same, where ranks may fail or die. timeout: seconds of an operation of the process group."""
    folder.mkdir(exist_ok=True)
    running = []
    for rank in range(n_ranks):
        ours, its = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_live, args=(its, rank, n_ranks, folder, timeout, job, args))
        process.start()
        its.close()
        running.append((process, ours))
    return [_wait_for(process, connection) for process, connection in running]


def _wait_for(process, connection) -> Ended:
    try:
        result, error = pickle.loads(connection.recv_bytes())
    except EOFError:
        result, error = None, ""
    process.join()
    connection.close()
    return Ended(result, error, process.exitcode)


def _live(connection, rank: int, n_ranks: int, folder: Path, timeout: float, job: Callable, args: tuple) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous, limit = f"file://{folder / 'rendezvous'}", timedelta(seconds=timeout)
    try:
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=n_ranks, timeout=limit)
        connection.send_bytes(pickle.dumps((job(*args), "")))  # send would share the tensors' memory, which dies here
        dist.destroy_process_group()
    except Exception as error:
        connection.send_bytes(pickle.dumps((None, str(error))))
        traceback.print_exc()
        os._exit(1)  # without waiting for the threads of operations that never end
