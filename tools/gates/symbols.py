"""What the vector objects give to the linker, and where vector instructions are in the library that it makes.

The vector code is compiled once per instruction set. A function that two of the objects define weakly, an inline
function of another library for instance, ends up in the library once, and if that is the copy that was compiled for
AVX-512, an older CPU stops with SIGILL. So what such an object defines must lie in a namespace of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

from tools.gates.common import GateError, build, run, tool, vector_objects

VECTOR_CAPABILITIES = ("AVX2", "AVX512")
_NAMESPACE = re.compile("4AVX2|6AVX512")  # as a mangled name spells them
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_VECTOR_INSTRUCTION = re.compile(r"\tv[a-z]|%[yz]mm|%k[0-7]")  # VEX or EVEX: mnemonic, operand


def symbols() -> None:
    """No function compiled for AVX2 or AVX-512 can replace one that an older CPU runs (nm, objdump)"""
    library = build("plain")
    for capability in VECTOR_CAPABILITIES:
        objects = vector_objects("plain", capability)
        if not objects:
            raise GateError(f"{capability}: no object file was built")
        for path in objects:
            _report(path.name, "weak symbols outside its namespace", foreign_symbols(path, capability))
    (linked,) = (library / "lgd_kernels").glob("_C*.so")
    _report(linked.name, "functions for every CPU with vector instructions", foreign_vector_code(linked))


def _report(where: str, what: str, found: list[str]) -> None:
    if found:
        raise GateError(f"{where}: {len(found)} {what}:\n" + "\n".join(found[:40]))
    print(f"{where}: no {what}")


def foreign_symbols(path: Path, capability: str) -> list[str]:
    """The weak symbols (nm's types W, V and u) that an object defines outside the namespace of its instruction set."""
    lines = run([tool("nm", "binutils"), "--defined-only", path], f"nm {path.name}").splitlines()
    weak = [line.split()[-1] for line in lines if line.split()[-2] in "WVu"]
    return [_readable(name) for name in weak if f"{len(capability)}{capability}" not in name]


def foreign_vector_code(library: Path) -> list[str]:
    """The functions of a library that use vector registers beyond SSE and do not lie in a namespace that may."""
    output = run([tool("objdump", "binutils"), "-d", "--no-show-raw-insn", library], f"objdump {library.name}")
    found, function = {}, ""
    for line in output.splitlines():
        if start := _FUNCTION.match(line):
            function = start[1]
        elif function not in found and not _NAMESPACE.search(function) and _VECTOR_INSTRUCTION.search(line):
            found[function] = line.strip()
    return [f"{_readable(name)}    {instruction}" for name, instruction in found.items()]


def _readable(name: str) -> str:
    return run([tool("c++filt", "binutils"), name], "c++filt").strip()
