"""What the gates share: where things are, how commands run, how the extension is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gates"
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # each includes the ones before it


class GateError(Exception):
    """Why a gate failed, in words for its reader; with the whole output of the command that failed, if one did."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def run(
    command: Sequence[str | Path], what: str, cwd: Path = ROOT, timeout: float = 1500, **environment: str | Path
) -> str:
    """The output of a command, stdout and stderr together. Raises GateError with the end of it if the command fails."""
    completed = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if completed.returncode != 0:
        tail = "\n".join(completed.stdout.splitlines()[-60:])
        message = f"{what}: exit status {completed.returncode}; the end of its output:\n{tail}"
        raise GateError(message, completed.stdout)
    return completed.stdout


def tool(name: str, package: str) -> str:
    """The path of a command. Raises GateError that says which Debian package has it."""
    path = shutil.which(name)
    if path is None:
        raise GateError(f"{name} was not found; install it with `apt-get install {package}`")
    return path


def build(name: str, flags: str = "") -> Path:
    """Build the extension; the folder that holds the package with it.

    flags: for the compiler, extra. Without, the object files of the ordinary build serve. Only what changed since the
    last time is compiled.
    """
    library = FOLDER / name / "lib"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", library]
    command += ["--build-temp", objects(name)] if flags else []
    run(command, f"building the extension ({name})", LGD_EXTRA_CXX_FLAGS=flags)
    not_code = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "lgd_kernels", library / "lgd_kernels", ignore=not_code, dirs_exist_ok=True)
    return library


def objects(name: str) -> Path:
    """The folder with the object files of `build(name)`."""
    ordinary = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return ordinary if name == "plain" else FOLDER / name / "temp"


def vector_objects(name: str, capability: str) -> list[Path]:
    """The object files of the vector code that `build(name)` made for an instruction set."""
    return sorted((objects(name) / "vector").glob(f"*.{capability}.o"))


def pytest_command(
    library: Path, capability: str, cover: int, tests: Sequence[str], expression: str = ""
) -> list[str | Path]:
    """The arguments of Python that run a thinned set of tests on the extension in `library`; see pytest_plugin.py."""
    command = ["-m", "pytest", "-p", "tools.gates.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    command += [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-o", f"pythonpath={library} {ROOT}"]
    command += [f"--extension-in={library}", f"--capability={capability}", f"--cover={cover}"]
    command += ["-k", expression] if expression else []
    return command + [ROOT / "tests" / test for test in tests]


def summary(output: str) -> str:
    """The line in which pytest counts its tests."""
    counts = [line.strip("= ") for line in output.splitlines() if " passed" in line]
    return counts[-1] if counts else "no test ran"
