"""Measure what decoupled training reaches beside backpropagation, and write docs/EVIDENCE.md about it.

Every run is stored as a line of evidence/results.csv as soon as it is over, and is not made again: start this as often
as you like. All runs together take CPU hours. They are made seed by seed, so that what is there when the time is over
is balanced. The page and its figures are made from the file alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from experiments import page, results
from experiments.measure import measure
from experiments.plan import EXPERIMENTS, Experiment, Run, quick, runs_of
from experiments.results import Result
from tqdm import tqdm

Experiments = dict[str, Experiment]


def measure_all(experiments: Experiments, runs: list[Run], path: Path, minutes: float, workers: int) -> int:
    """Make the runs and store them in the file at path; none is started after so many minutes. How many were made."""
    end = time.monotonic() + 60 * minutes
    made = 0
    with tqdm(total=len(runs), unit="run") as bar:
        for result in _results(experiments, runs, end, workers):
            results.append(path, result)
            made += 1
            bar.set_postfix_str(str(result.run))
            bar.update()
    return made


def _results(experiments: Experiments, runs: list[Run], end: float, workers: int) -> Iterator[Result]:
    """As they come in; no run is started after `end`, which is a time of time.monotonic."""
    if workers == 1:
        for run in runs:
            if time.monotonic() >= end:
                return
            yield measure(experiments[run.experiment], run)
        return
    waiting, running = iter(runs), set()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while True:
            while len(running) < workers and time.monotonic() < end and (run := next(waiting, None)) is not None:
                running.add(pool.submit(measure, experiments[run.experiment], run))
            if not running:
                return
            done: set[Future[Result]]
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [experiment.name for experiment in EXPERIMENTS]
    add("--only", choices=names, action="append", metavar="EXPERIMENT", help=f"one of {', '.join(names)}; repeatable")
    add("--budget-minutes", type=float, default=float("inf"), metavar="M", help="start no run after M minutes")
    add("--workers", type=int, default=1, metavar="N", help="processes of one thread each (default: %(default)s)")
    add("--quick", action="store_true", help="tiny runs that say nothing, to see that all works; written to out/")
    add("--report", action="store_true", help="make no runs; only page and figures, from the file")
    add("--output", type=Path, metavar="FOLDER", help="for EVIDENCE.md and evidence/ (default: docs)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"argument --workers: must be at least 1, got {args.workers}")
    if args.output is None:
        args.output = Path("out" if args.quick else "docs")
    return args


def main(argv: list[str] | None = None) -> int:
    """The number of runs that were made."""
    args = arguments(argv)
    plan = [quick(experiment) if args.quick else experiment for experiment in EXPERIMENTS]
    path = args.output / "evidence" / "results.csv"
    made = 0
    if not args.report:
        is_done = {result.run for result in results.read(path)}
        chosen = tuple(experiment for experiment in plan if not args.only or experiment.name in args.only)
        left = [run for run in runs_of(chosen) if run not in is_done]
        experiments = {experiment.name: experiment for experiment in chosen}
        made = measure_all(experiments, left, path, args.budget_minutes, args.workers)
    page.write(path, args.output / "EVIDENCE.md", plan)
    print(f"{made} runs made; the page is {args.output / 'EVIDENCE.md'}")
    return made


if __name__ == "__main__":
    main()
