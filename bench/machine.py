"""The machine, the versions and the commit that results belong to."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import lgd_kernels
from lgd_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
# a run changes these itself, and so does that of tools/gpu/tune.py: they do not make a commit dirty
WRITTEN_BY_US = ("bench/results", "README.md", "triton_kernels/tiles")


@dataclass(frozen=True)
class Machine:
    """Where, when and with what a run was made.

    device: the name of its results file. cpu: what computes, a GPU too, as it calls itself. isa: its instruction set;
    for a GPU the architecture and the versions of what runs on it. threads: of the CPU, 0 where a GPU computes.
    """

    date: str
    commit: str
    device: str
    cpu: str
    isa: str
    threads: int
    torch: str
    python: str
    lgd_kernels: str


def cpu_name() -> str:
    """The CPU's model name, as it calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    if found:
        return found[1].strip()
    if platform.system() == "Darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine()


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_slug(cpu: str, n_cores: int, isa: str) -> str:
    """A file name such as amd-epyc-2-cores-avx512."""
    model = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", cpu, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9]+", f"{model} {n_cores} {'core' if n_cores == 1 else 'cores'} {isa}".lower())
    return "-".join(words)


def _output_of(*command: str) -> str:
    """What a command prints, or nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The commit of the checkout, marked -dirty if tracked files differ from it; "unknown" outside a checkout."""
    revision = _output_of("git", "rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    others = [f":(exclude){path}" for path in WRITTEN_BY_US]
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return f"{revision}-dirty" if changed else revision


def gpu_slug(name: str) -> str:
    """A file name such as nvidia-h200."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _describe_gpu() -> dict[str, str | int]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    versions = f"CUDA {torch.version.cuda}, driver {driver or 'unknown'}, Triton {_version_of('triton')}"
    return {
        "device": gpu_slug(properties.name),
        "cpu": properties.name,
        "isa": f"sm_{properties.major}{properties.minor}, {versions}",
        "threads": 0,
    }


def _describe_cpu() -> dict[str, str | int]:
    cpu, isa = cpu_name(), torch.backends.cpu.get_cpu_capability()
    return {
        "device": device_slug(cpu, cores(), isa),
        "cpu": cpu,
        "isa": isa,
        "threads": torch.get_num_threads(),
    }


def describe_machine(device: str = "cpu") -> Machine:
    """This machine, now, as it computes on "cpu" or "cuda"."""
    return Machine(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        **(_describe_cpu() if device == "cpu" else _describe_gpu()),
        torch=torch.__version__,
        python=platform.python_version(),
        lgd_kernels=lgd_kernels.__version__,
    )


def cpu_seconds_of_others() -> float | None:
    """CPU time that everything but this process has used since the machine started; None where Linux does not say."""
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, statistics.read_text().split()[1:9])
    own = os.times()
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system - own.children_user - own.children_system


def backend_of(operation: str, device: str = "cpu") -> str:
    """The name of the backend that answers for an operation of lgd_kernels on "cpu" or "cuda"."""
    answers = backends.implementation(operation, device)
    for name in ("reference", *(name for name in backends.BACKENDS if name != "auto")):
        with contextlib.suppress(RuntimeError), backends.force(name):
            if backends.implementation(operation, device) is answers:
                return name
    return "auto"
