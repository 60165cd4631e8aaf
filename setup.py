"""Builds the extension `lgd_kernels._C`. Everything else about the package is in pyproject.toml.

The vector code in csrc/cpu is compiled once per instruction set (DEFAULT, AVX2, AVX512) with its own flags, which
torch's BuildExtension cannot do; the copies live in different namespaces and one is chosen at run time. The rest is an
ordinary extension. Where torch is built for CUDA and nvcc is there, it has the kernels in csrc/cuda too: for the GPUs
of this machine, or for those in TORCH_CUDA_ARCH_LIST. Without a C++ compiler the package installs all the same and runs
on its plain PyTorch reference.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths
except ModuleNotFoundError as error:
    sys.exit(
        f"lgd_kernels needs torch to build ({error}). Install torch first, then `pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
VECTOR_SOURCES = [
    CPU / "softmax_infogain.cpp",
    CPU / "local_residual.cpp",
    CPU / "linear_tiles.cpp",
    CPU / "decoupled_linear.cpp",
    CPU / "decoupled_step.cpp",
]
COMMON_SOURCES = [
    "csrc/bindings.cpp",
    "csrc/torch/common.cpp",
    "csrc/torch/decoupled_linear.cpp",
    "csrc/torch/decoupled_step.cpp",
    "csrc/torch/huge_pages.cpp",
    "csrc/torch/layers_bindings.cpp",
    "csrc/torch/local_residual.cpp",
    "csrc/torch/softmax_infogain.cpp",
    "csrc/torch/stacks.cpp",
    "csrc/torch/softmax_infogain_autograd.cpp",
    "csrc/torch/softmax_infogain_bindings.cpp",
    "csrc/cpu/gemm.cpp",
    "csrc/cpu/parallel.cpp",
]
CUDA_SOURCES = [
    "csrc/torch/cuda_device.cpp",
    "csrc/cuda/compiled_for.cu",
    "csrc/cuda/count_labels.cu",
    "csrc/cuda/decoupled_linear.cu",
    "csrc/cuda/decoupled_linear_backward.cu",
    "csrc/cuda/layers.cu",
    "csrc/cuda/local_residual.cu",
    "csrc/cuda/softmax_infogain.cu",
]
# what tools/gates/cuda_ahead_of_time.py checks; split: the many kernels of a file on all cores
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--split-compile=0"]
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns of its own AVX-512 header (bug 105593)
CXX_FLAGS += ["-Wno-psabi"]  # vectors wider than the baseline has are passed between inlined functions only
# for instance "-fsanitize=address,undefined -g": used by `make gates`
EXTRA_FLAGS = os.environ.get("LGD_EXTRA_CXX_FLAGS", "").split()


def compiler() -> str | None:
    """The C++ compiler, or None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def why_not_built() -> str | None:
    """Why the extension cannot be built on this machine; None if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the CPU kernels are for x86-64 and this machine is {platform.machine()}"
    if compiler() is None:
        return "no C++ compiler was found; install g++ and install lgd_kernels again to get the fast kernels"
    return None


def why_no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built; None if they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if CUDA_HOME is None or not (nvcc := Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return f"torch is built for CUDA {torch.version.cuda}, but nvcc was not found (CUDA_HOME={CUDA_HOME})"
    release = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda}, and {nvcc} is another: {release and release[0]}"
    return None


class BuildWithVectorCode(BuildExtension):
    """BuildExtension that first compiles the vector sources, once per instruction set."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if ROOT not in Path(self.build_temp).resolve().parents:  # pip's, which it deletes: all would be compiled again
            self.build_temp = str(ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def build_extensions(self) -> None:
        for extension in self.extensions:
            # DEFAULT first: where two objects define the same inline function, the linker keeps the first
            extension.extra_objects = self._vector_objects() + extension.extra_objects
        super().build_extensions()

    def _vector_objects(self) -> list[str]:
        from ninja import BIN_DIR
        from ninja.ninja_syntax import Writer

        folder = Path(self.build_temp).resolve() / "vector"
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in [*include_paths("cpu"), sysconfig.get_path("include")]]
        objects = []
        with open(folder / "build.ninja", "w") as file:
            ninja = Writer(file, width=120)
            command = f"{compiler()} -MMD -MF $out.d $flags -c $in -o $out"
            ninja.rule("compile", command, depfile="$out.d", deps="gcc", description="$description")
            for capability, flags in CAPABILITIES.items():
                defines = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
                for source in VECTOR_SOURCES:
                    target = str(folder / f"{source.stem}.{capability}.o")
                    ninja.build(
                        target,
                        "compile",
                        str(ROOT / source),
                        variables={
                            "flags": " ".join([*CXX_FLAGS, *EXTRA_FLAGS, *flags, *defines, *includes]),
                            "description": f"{source} for {capability}",
                        },
                    )
                    objects.append(target)
        subprocess.run([str(Path(BIN_DIR) / "ninja"), "-C", str(folder)], check=True)
        return objects


def extensions() -> list:
    """The extension, or nothing where it cannot be built."""
    if reason := why_not_built():
        print(f"lgd_kernels: installing without compiled kernels, on the PyTorch reference: {reason}", file=sys.stderr)
        return []
    flags = [*CXX_FLAGS, *EXTRA_FLAGS]
    options = {"extra_link_args": ["-fopenmp", *EXTRA_FLAGS]}
    if reason := why_no_cuda():
        print(f"lgd_kernels: installing without CUDA kernels: {reason}", file=sys.stderr)
        extension = CppExtension("lgd_kernels._C", COMMON_SOURCES, extra_compile_args=flags, **options)
    else:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ and torch.cuda.device_count() == 0:  # torch would not know what for
            os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0;12.0+PTX"
        major, minor = torch.version.cuda.split(".")[:2]
        version = 1000 * int(major) + 10 * int(minor)  # as in CUDA's own headers
        flags = {"cxx": [*flags, f"-DLGD_WITH_CUDA={version}"], "nvcc": NVCC_FLAGS}
        sources = COMMON_SOURCES + CUDA_SOURCES
        extension = CUDAExtension("lgd_kernels._C", sources, extra_compile_args=flags, **options)
    return [extension]


setup(
    packages=[
        "lgd_kernels",
        "lgd_kernels.autograd",
        "lgd_kernels.decoupled",
        "lgd_kernels.diagnostics",
        "lgd_kernels.losses",
        "lgd_kernels.reference",
        "lgd_kernels.triton_kernels",  # a link to triton_kernels/, so that a checkout works without being installed
    ],
    include_package_data=False,  # the next line says it all, and the folder is no package
    package_data={"lgd_kernels.triton_kernels": ["tiles/*.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildWithVectorCode.with_options(use_ninja=True)},
)
