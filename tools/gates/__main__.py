"""`python -m tools.gates [name ...]`: run the gates, all of them by default, and end with a table."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable

from tools.gates.common import GateError
from tools.gates.cuda_ahead_of_time import cuda_ahead_of_time
from tools.gates.cuda_on_host import cuda_on_host
from tools.gates.emulated_cpus import emulated_cpus
from tools.gates.sanitizers import sanitizers
from tools.gates.symbols import symbols
from tools.gates.triton_ahead_of_time import triton_ahead_of_time
from tools.gates.without_compiler import without_compiler

GATES: dict[str, Callable[[], None]] = {
    gate.__name__: gate
    for gate in (
        symbols,
        triton_ahead_of_time,
        cuda_on_host,
        sanitizers,
        emulated_cpus,
        without_compiler,
        cuda_ahead_of_time,
    )
}


def run_gate(name: str) -> tuple[bool, float]:
    """Run one gate; (whether it passed, seconds)."""
    print(f"\n=== {name}: {GATES[name].__doc__}", flush=True)
    start = time.perf_counter()
    passed = False
    try:
        GATES[name]()
        passed = True
    except GateError as error:
        print(f"FAILED: {error}")
    except Exception:
        print(f"FAILED: the gate itself\n{traceback.format_exc()}")
    seconds = time.perf_counter() - start
    print(f"{name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s", flush=True)
    return passed, seconds


def main() -> None:
    about = "\n".join(f"  {name:22}{gate.__doc__}" for name, gate in GATES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.gates",
        description=f"The long checks of the build:\n\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gates", nargs="*", metavar="gate", help="the gates to run (default: all of them)")
    names = parser.parse_args().gates or list(GATES)
    if unknown := [name for name in names if name not in GATES]:
        parser.error(f"unknown gate {', '.join(unknown)}; choose from {', '.join(GATES)}")
    results = {name: run_gate(name) for name in names}
    print(f"\n{'gate':24}{'result':10}{'seconds':>8}")
    for name, (passed, seconds) in results.items():
        print(f"{name:24}{'passed' if passed else 'FAILED':10}{seconds:8.0f}")
    sys.exit(0 if all(passed for passed, _ in results.values()) else 1)


if __name__ == "__main__":
    main()
