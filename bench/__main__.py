"""`python -m bench`: measure, report, and bring the README's table and the picture up to date."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

import torch

from bench.floors import measure_gemm_rate
from bench.machine import ROOT, describe_machine
from bench.measure import measure_workload
from bench.plot import update_plots
from bench.report import report
from bench.results import RESULTS, Row, append
from bench.table import update_readme
from bench.timing import FULL_SECONDS, QUICK_SECONDS
from bench.workloads import WORKLOADS, Workload

README = ROOT / "README.md"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure lgd_kernels against PyTorch on this machine. Every result is checked against float64 "
        "first: a peer that is wrong gets no time. A complete run is appended to bench/results/<device>.csv (on a GPU "
        "workload by workload, so that nothing is lost if it is stopped), and the README's table and the picture are "
        "made from that file.",
        epilog="exit status: 0, also if goals are missed (other machines have other ratios); 1 if a result of "
        "lgd_kernels is wrong, if a workload could not be measured, or if a file cannot be brought up to date",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("run", "table", "plot"),
        default="run",
        help="run (the default): measure, report, write results, table and plot; "
        "table: only write README.md's table; plot: only draw the pictures",
    )
    parser.add_argument(
        "--only", metavar="NAME", default="", help="only workloads whose name contains NAME; writes nothing"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a sixteenth of the samples, timed for a moment; writes nothing"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="whose workloads: the CPU's (the default) or a GPU's"
    )
    parsed = parser.parse_args(arguments)
    if parsed.action != "run" and (parsed.only or parsed.quick):
        parser.error(f"--only and --quick belong to a run, not to {parsed.action}")
    names = [workload.name for workload in WORKLOADS if workload.device == parsed.device]
    if not any(parsed.only in name for name in names):
        parser.error(f"--only {parsed.only}: no workload has this in its name; there are\n  " + "\n  ".join(names))
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device on this machine")
    return parsed


@contextlib.contextmanager
def progress(total: float) -> Iterator[Callable[[str, float], None]]:
    """A bar that shows what is being measured and how far it got; plain lines where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda label, share: None if share else print(f"measuring {label}", flush=True)
        return
    with tqdm(total=total * (1 + 1e-9), bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}") as bar:

        def show(label: str, share: float) -> None:
            bar.set_description(label, refresh=False)
            bar.update(share)

        yield show


def measure(
    workloads: list[Workload], seconds: float, device: str, keep: Callable[[list[Row]], None]
) -> tuple[list[Row], list[str]]:
    """(the rows of a run over these workloads, each timed for about this many seconds; why some of them are not there).

    keep: gets the rows of every workload as soon as they are known. Whoever stops the run gets what is there.
    """
    rows: list[Row] = []
    failures: list[str] = []
    try:
        machine, gemm_rate = describe_machine(device), measure_gemm_rate(device)
        with progress(len(workloads)) as show:
            for workload in workloads:
                show(workload.label, 0.0)
                try:
                    after_each_round = functools.partial(show, workload.label)
                    of_workload = measure_workload(workload, seconds, machine, gemm_rate, after_each_round)
                except Exception as error:  # the others may fit into the memory that this one did not fit into
                    failures.append(f"{workload.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                else:
                    keep(of_workload)
                    rows += of_workload
    except KeyboardInterrupt:
        failures.append(f"stopped after {len({row.workload for row in rows})} of {len(workloads)} workloads")
    return rows, failures


def run(device: str, only: str, quick: bool) -> int:
    """Measure and report; write what a complete run writes. Returns the exit status."""
    workloads = [workload for workload in WORKLOADS if only in workload.name and workload.device == device]
    if quick:
        workloads = [workload.reduced() for workload in workloads]

    def append_to_results(rows: list[Row]) -> None:
        append(RESULTS / f"{rows[0].device}.csv", rows)

    writes = not (only or quick)
    at_once = writes and device != "cpu"  # time on a GPU is borrowed, and ends when it ends
    seconds = QUICK_SECONDS if quick else FULL_SECONDS[device]
    rows, failures = measure(workloads, seconds, device, append_to_results if at_once else lambda rows: None)
    if rows:
        print(report(rows, workloads))
    print("".join(f"not measured: {failure}\n" for failure in failures), end="")
    if writes and rows and (at_once or not failures):
        if not at_once:
            append_to_results(rows)
        show_results()
    return int(bool(failures) or any(row.peer == "ours" and row.median_ms is None for row in rows))


def show_results() -> None:
    """Bring the README's table and the pictures up to date with the results."""
    update_readme(README, RESULTS)
    try:
        update_plots(RESULTS)
    except ModuleNotFoundError as error:
        print(f"no pictures: {error}; install it, and then: python -m bench plot")


def main() -> int:
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of workers that runs beside the timing
    try:
        if arguments.action == "table":
            update_readme(README, RESULTS)
        elif arguments.action == "plot":
            update_plots(RESULTS)
        else:
            return run(arguments.device, arguments.only, arguments.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
