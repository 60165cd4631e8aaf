"""The CUDA kernels compiled for every architecture: what they use, that the main path moves 128 bits at a time, that
products run on tensor cores; and the one file of glue that needs CUDA's headers, against whatever torch is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gates.common import FOLDER, ROOT, GateError, run, tool

WORK = FOLDER / "cuda_ahead_of_time"
BUDGET = Path(__file__).with_name("cuda_budget.json")
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
GLUE = "csrc/torch/cuda_device.cpp"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-cubin")
NVCC = (  # nvcc of CUDA 13.0, 350 MB, where none is on PATH
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.3.5.0.6",
)
# 128-bit loads and stores of global memory that a kernel has at least: a register row is 8 of each
WIDE = {
    "in_register_lanes": (8, 8),
    "in_register_block": (8, 8),
    "in_shared_lanes": (4, 1),
    "in_shared_block": (4, 1),
    "in_stream": (8, 4),
    "double_backward_in_stream": (8, 4),
    "local_residual_kernel": (8, 6),
    "forward_kernel": (8, 3),
    "backward_kernel": (8, 1),
}
_ENTRY = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?",
    re.DOTALL,
)


def cuda_ahead_of_time() -> None:
    """The CUDA kernels for every architecture: no spills, registers within the budget, 128-bit accesses (nvcc)"""
    nvcc = find_nvcc()
    WORK.mkdir(parents=True, exist_ok=True)
    _check_glue(nvcc)
    jobs = [(nvcc, source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    found = {architecture: {} for architecture in ARCHITECTURES}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for (*_, architecture), kernels in zip(jobs, pool.map(lambda job: _compile(*job), jobs), strict=True):
            found[architecture] |= kernels
    if os.environ.get("LGD_UPDATE_BUDGET"):
        BUDGET.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [problem for architecture in found for problem in _beyond_budget(architecture, found[architecture])]
    if wrong:
        raise GateError("\n".join(wrong) + f"\nLGD_UPDATE_BUDGET=1 writes what was found to {BUDGET.name}")


def find_nvcc() -> Path:
    """nvcc from PATH, or else installed into a virtual environment of this gate."""
    if path := shutil.which("nvcc"):
        return Path(path)
    venv = WORK / "venv"
    if not (venv / "installed").exists():
        run([sys.executable, "-m", "venv", venv], "making a virtual environment for nvcc")
        command = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *NVCC]
        run(command, "installing nvcc")
        (venv / "installed").touch()
    (nvcc,) = venv.glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc")
    return nvcc


def find_cuobjdump() -> str:
    """cuobjdump from Triton's package, which the tests need anyway, or from PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else tool("cuobjdump", "nvidia-cuda-toolkit")


def _check_glue(nvcc: Path) -> None:
    """Compile the glue for CUDA, by way of nvcc, which knows where its headers are. Raises GateError if that fails."""
    from torch.utils.cpp_extension import include_paths

    # a torch without CUDA lacks one generated header, and does without if it is told so
    command = [nvcc, "-x", "c++", "-std=c++20", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += [f"-I{path}" for path in include_paths("cpu")]
    run([*command, "-c", ROOT / GLUE, "-o", WORK / "glue.o"], GLUE)
    print(f"{GLUE}: compiles")


def _compile(nvcc: Path, source: str, architecture: str) -> dict[str, dict[str, int]]:
    """Compile for an architecture: kernel -> what it uses. Raises GateError for a spill or a narrow access."""
    cubin = WORK / f"{Path(source).stem}.{architecture}.cubin"
    command = [nvcc, *FLAGS, f"-arch={architecture}", ROOT / "csrc" / "cuda" / source, "-o", cubin]
    report = run(command, f"{source} for {architecture}")
    names, resources = [], []
    for entry in _ENTRY.finditer(report):
        names.append(entry[1])
        resources.append([int(number or 0) for number in entry.groups()[1:]])
    if not names:
        raise GateError(f"{source} for {architecture}: no kernel found in\n{report[:2000]}")
    found = {}
    for name, (stack, stores, loads, registers, shared) in zip(readable(names), resources, strict=True):
        if stack or stores or loads:
            raise GateError(f"{architecture}: {name}: {stack} bytes of stack, {stores} + {loads} bytes spilled")
        found[name] = {"registers": registers, "shared": shared}
    narrow = _narrow_kernels(cubin)
    if narrow:
        raise GateError(f"{architecture}: not as planned\n" + "\n".join(narrow))
    most = max(use["registers"] for use in found.values())
    where = f"{source} for {architecture}"
    print(f"{where}: {len(found)} kernels, no spills, at most {most} registers, 128-bit accesses as planned")
    return found


def readable(names: list[str]) -> list[str]:
    """Mangled names of kernels as `in_stream<Constant, float, float>`."""
    output = run([tool("c++filt", "binutils"), *names], "c++filt").splitlines()
    return [re.sub(r"lgd::gpu::|\(anonymous namespace\)::|^void |\(.*", "", line) for line in output]


def _narrow_kernels(cubin: Path) -> list[str]:
    """The kernels with fewer 128-bit loads or stores than WIDE says, with accesses to local memory, or with products
    that are meant for tensor cores and do not run there."""
    narrow = []
    for name, code in _functions(cubin):
        loads, stores = (len(re.findall(rf"\b{op}\.E[.\w]*\.128", code)) for op in ("LDG", "STG"))
        wanted = WIDE.get(name.split("<")[0], (0, 0))
        if loads < wanted[0] or stores < wanted[1] or re.search(r"\b(LDL|STL)\b", code):
            narrow.append(f"{name}: {loads} loads and {stores} stores, planned {wanted[0]} and {wanted[1]}")
        if re.search(r"^(forward|backward)_kernel<.*(Halves|Tf32)", name) and not re.search(r"\bHMMA\b", code):
            narrow.append(f"{name}: no product on tensor cores")
    return narrow


def _functions(cubin: Path) -> Iterator[tuple[str, str]]:
    """(name, SASS) of every kernel."""
    sass = run([find_cuobjdump(), "-sass", cubin], "cuobjdump")
    pieces = re.split(r"Function : (\S+)", sass)[1:]
    yield from zip(readable(pieces[::2]), pieces[1::2], strict=True)


def _beyond_budget(architecture: str, found: dict[str, dict[str, int]]) -> Iterator[str]:
    budget = json.loads(BUDGET.read_text()).get(architecture, {})
    for name in sorted(found.keys() ^ budget.keys()):
        yield f"{architecture}: {name}: {'no budget' if name in found else 'in the budget, but not compiled'}"
    for name in found.keys() & budget.keys():
        for what, used in found[name].items():
            if used > budget[name][what]:
                yield f"{architecture}: {name}: {used} {what}, the budget is {budget[name][what]}"
