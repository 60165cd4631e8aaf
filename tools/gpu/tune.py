"""`python -m tools.gpu.tune`: which tiles are the fastest on this machine's GPU, for triton_kernels/tiles/sm_90.json.

What is timed is a whole step of training, as in `python -m bench`, in which the products of one class have the tiles in
question and all others those that are counted. Tiles are timed only if every kernel that the gate compiles of such
products (tools/gates/triton_layers.py) passes with them, which means that none spills, and if the step is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from bench.__main__ import progress
from bench.machine import describe_machine
from bench.measure import Measurement, measure_problem
from lgd_kernels.triton_kernels.common import architecture_of
from lgd_kernels.triton_kernels.tile_table import (
    Entry,
    LinearTiles,
    ProductClass,
    Table,
    path_of,
    read_table,
    write_table,
)
from tools.gates.triton_layers import ARCHITECTURES
from tools.gpu.__main__ import why_not
from tools.gpu.tile_trials import SIZES, Size, Steps, StepsOfBenchmark, candidates, name_of, why_refused

SECONDS_PER_CLASS = 4.0  # of timing
SECONDS = 480.0  # in all: done, with the class that is under way, in 10 minutes


def tune(
    path: Path,
    table: Table,
    sizes: Sequence[Size],
    seconds: float,
    steps_of: Callable[[Size], Steps],
    reasons_against: Callable[[ProductClass, Sequence[LinearTiles]], Iterable[str | None]],
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Add to the table what it lacks of the products in steps of these sizes, and write it after every one of them.

    reasons_against: for each of the tiles why they are not even to be timed, or None.

    Returns:
        Whether that was all: after so many seconds no further product is begun.
    """
    start, known = clock(), {entry.product for entry in table.entries}
    with progress(len(sizes)) as show:
        for size in sizes:
            steps = steps_of(size)
            missing = [product for product in steps.products() if product not in known]
            for product in missing:
                if clock() - start >= seconds:
                    return False
                show(steps.label, 0.0)
                tried = candidates(product)
                reasons = dict(zip(tried, reasons_against(product, tried), strict=True))
                if entry := fastest(steps, product, reasons):
                    table = dataclasses.replace(table, entries=[*table.entries, entry])
                    write_table(path, table)
                known.add(product)
                show(steps.label, 1 / len(missing))
            if not missing:
                show(steps.label, 1.0)
    return True


def fastest(steps: Steps, product: ProductClass, reasons: dict[LinearTiles, str | None]) -> Entry | None:
    """The fastest of the tiles that are right and that nothing speaks against; prints what became of each.

    reasons: against each of the tiles. The first ones are those that are counted, and are timed whatever speaks against
        them, to compare with; there is no entry if they are wrong.
    """
    counted = next(iter(reasons))
    timed = {name_of(tiles): tiles for tiles, reason in reasons.items() if reason is None or tiles == counted}
    measured = measure_problem(steps.problem(product, timed.values()), SECONDS_PER_CLASS, lambda share: None)
    print(f"\n{steps.label}: {product}\n{_report(reasons, measured)}", flush=True)
    times = {name: timing.median_ms for name, timing in measured.timings.items()}
    usable = [name for name in times if reasons[timed[name]] is None]
    if name_of(counted) not in times or not usable:
        return None
    best = min(usable, key=times.__getitem__)
    return Entry(product, timed[best], steps.label, times[best], times[name_of(counted)], measured.checks[best].error)


def _report(reasons: dict[LinearTiles, str | None], measured: Measurement) -> str:
    """A line for each of the tiles: what speaks against them, and their time and error or why there is none."""
    lines = []
    for tiles, reason in reasons.items():
        name = name_of(tiles)
        outcomes = [reason] if reason else []
        if name in measured.timings:
            outcomes += [f"{measured.timings[name].median_ms:.4f} ms, off by {measured.checks[name].error:.1e}"]
        elif name in measured.checks:
            outcomes += [measured.checks[name].status]
        lines.append(f"  {name}: {'; '.join(outcomes)}")
    return "\n".join(lines)


def table_of_this_machine(path: Path) -> Table:
    """What the file has, if this machine wrote it with the software that it has now; otherwise without entries."""
    machine = describe_machine("cuda")
    new = Table(machine.cpu, torch.__version__, triton.__version__, machine.commit, [])
    old = read_table(path) if path.exists() else new
    return old if dataclasses.replace(old, entries=[]) == new else new


def _ignore_interrupts() -> None:
    """In a process that compiles: Ctrl-C is for the one that waits for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.tune",
        description="Find the fastest tiles of the layer ops on this machine's GPU and write them to "
        "lgd_kernels/triton_kernels/tiles, in one file for its architecture, which is to be committed. What was found "
        "is kept if this is stopped; the next run on the same machine and commit goes on from there.",
        epilog="exit status: 0 if all sizes are done",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="after so many no further product is begun (%(default)g)"
    )
    return parser.parse_args(arguments)


def main() -> int:
    seconds = parse_arguments().seconds
    if reason := why_not("make tune"):
        print(reason, file=sys.stderr)
        return 1
    architecture = architecture_of(torch.device("cuda", torch.cuda.current_device()))
    if architecture not in ARCHITECTURES:
        print(f"make tune: this GPU is an sm_{architecture}, and the gate checks {ARCHITECTURES} only", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    path, complete = path_of(architecture), False
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _ignore_interrupts) as pool:

        def reasons_against(product: ProductClass, tried: Sequence[LinearTiles]) -> Iterable[str | None]:
            return pool.map(why_refused, itertools.repeat(product), tried)

        try:
            complete = tune(path, table_of_this_machine(path), SIZES, seconds, StepsOfBenchmark, reasons_against)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
    print(f"\n{'complete' if complete else 'stopped: run it again to go on'}; see {path}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
