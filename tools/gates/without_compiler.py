"""The package as it installs where there is no C++ compiler."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tools.gates.common import FOLDER, ROOT, GateError, build, run

NO_COMPILER = "/nonexistent/c++"
WORK = FOLDER / "without_compiler"


def without_compiler() -> None:
    """Installed without a compiler, the package says so once and gives the same results"""
    sys.path.insert(0, str(ROOT / "tests"))
    import fixed_results

    library = install()
    ours = _results("installed without a compiler", library, "auto", "--refused", "nonsense", "cpp")
    check_report(ours, library)
    ordinary = build("plain")
    compiled = _results("compiled", ordinary, "auto")
    forced = _results("compiled, LGD_BACKEND=reference", ordinary, "reference", "--refused", "nonsense")
    _expect(compiled["capability"] is not None, "the ordinary build has no extension")
    _expect(not compiled["warnings"] + forced["warnings"], "the ordinary build warns")
    _expect("LGD_BACKEND=reference" in forced["describe"], "LGD_BACKEND=reference is not taken")
    truth = fixed_results.load(forced["file"])["float64"]
    for report in (ours, compiled, forced):
        for dtype, found in fixed_results.load(report["file"]).items():
            off = fixed_results.differences(found, truth, dtype)
            _expect(not off, f"{report['name']}: results differ:\n" + "\n".join(off[:20]))
        print(f"{report['name']}: the same results within tolerance in {', '.join(fixed_results.DTYPES)}")


def install() -> Path:
    """Install a copy of the sources with pip, no compiler in sight; the folder that holds the package."""
    shutil.rmtree(WORK, ignore_errors=True)
    not_sources = shutil.ignore_patterns(".*", "build", "out", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, WORK / "source", ignore=not_sources)
    library = WORK / "lib"
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation"]
    command += ["--no-deps", "--target", library, WORK / "source"]
    run(command, "pip install without a compiler", CXX=NO_COMPILER)
    built = list(library.rglob("*.so"))
    _expect(not built, f"a compiler was found all the same: {built}")
    return library


def check_report(report: dict, library: Path) -> None:
    """The import worked, warned once and usefully, and refuses backends that it does not have."""
    _expect(Path(report["package"]) == library / "lgd_kernels", f"another package was imported: {report['package']}")
    warnings = report["warnings"]
    _expect(len(warnings) == 1 and not report["later warnings"], f"expected exactly one warning, got {warnings}")
    _expect("to get the fast kernels, install g++" in warnings[0], f"the warning gives no advice: {warnings[0]}")
    nonsense, cpp = report["refused"]["nonsense"], report["refused"]["cpp"]
    _expect(nonsense.startswith("ValueError: LGD_BACKEND: unknown backend 'nonsense'; choose one of auto, "), nonsense)
    _expect(cpp.startswith("RuntimeError: LGD_BACKEND: backend 'cpp' is not built"), cpp)
    print(f"one warning: {warnings[0]}")


def _results(name: str, library: Path, backend: str, *options: str) -> dict:
    """The report of tests/fixed_results.py on the package in `library`, with its name and the file of its results."""
    file = WORK / f"{library.parent.name}-{backend}.npz"
    # -S: no .pth files; that of an editable installation would find the extension of this checkout
    command = [sys.executable, "-S", ROOT / "tests" / "fixed_results.py", file, *options]
    path = os.pathsep.join([str(library), *(entry for entry in sys.path if Path(entry).name == "site-packages")])
    output = run(command, name, cwd=WORK, PYTHONPATH=path, LGD_BACKEND=backend, PYTHONWARNINGS="ignore")
    return {**json.loads(output.splitlines()[-1]), "name": name, "file": file}


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise GateError(otherwise)
