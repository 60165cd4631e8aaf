"""`python -m bench`: measure, report, and bring the README's table and the picture up to date."""

from __future__ import annotations

import argparse
import os
import sys

from tqdm import tqdm

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
        "first: a peer that is wrong gets no time. A complete run is appended to bench/results/<device>.csv, and the "
        "README's table and the picture are made from that file.",
        epilog="exit status: 0, also if goals are missed (other machines have other ratios); 1 if a result of "
        "lgd_kernels is wrong, or if a file cannot be brought up to date",
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
    parsed = parser.parse_args(arguments)
    if parsed.action != "run" and (parsed.only or parsed.quick):
        parser.error(f"--only and --quick belong to a run, not to {parsed.action}")
    if not any(parsed.only in workload.name for workload in WORKLOADS):
        names = "\n  ".join(workload.name for workload in WORKLOADS)
        parser.error(f"--only {parsed.only}: no workload has this in its name; there are\n  {names}")
    return parsed


def measure(workloads: list[Workload], seconds: float) -> list[Row]:
    """The rows of a run over these workloads, each timed for about this many seconds."""
    machine, gemm_rate = describe_machine(), measure_gemm_rate()
    rows: list[Row] = []
    with tqdm(total=len(workloads) * (1 + 1e-9), bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}") as progress:
        for workload in workloads:
            progress.set_description(workload.label)
            rows += measure_workload(workload, seconds, machine, gemm_rate, progress.update)
    return rows


def run(only: str, quick: bool) -> int:
    """Measure and report; write what a complete run writes. Returns the exit status."""
    workloads = [workload for workload in WORKLOADS if only in workload.name]
    if quick:
        workloads = [workload.reduced() for workload in workloads]
    rows = measure(workloads, QUICK_SECONDS if quick else FULL_SECONDS)
    print(report(rows, workloads))
    if not (only or quick):
        append(RESULTS / f"{rows[0].device}.csv", rows)
        update_plots(RESULTS)
        update_readme(README, RESULTS)
    return int(any(row.peer == "ours" and row.median_ms is None for row in rows))


def main() -> int:
    arguments = parse_arguments()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of workers that runs beside the timing
    try:
        if arguments.action == "table":
            update_readme(README, RESULTS)
        elif arguments.action == "plot":
            update_plots(RESULTS)
        else:
            return run(arguments.only, arguments.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
