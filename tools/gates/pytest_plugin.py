"""A pytest plugin (`-p tools.gates.pytest_plugin`) for the gates that run the tests slowly.

It thins parametrized tests: with `--cover=2` it keeps of every test the cases in which some pair of parameter values
occurs for the first time, so that every pair that the full run has is still run once; with `--cover=1` the same for
single values. Of a test that runs on several backends it keeps the compiled one of the CPU, or that of `--backend`. And
where the tests are meant for an extension and an instruction set it stops the run unless they run on those.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pytest

Case = frozenset[tuple[str, int]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gates")
    group.addoption("--cover", type=int, default=2, help="how many parameters at a time are fully combined")
    group.addoption("--backend", default="cpp", help="which one of the backends that a test runs on is kept")
    group.addoption("--extension-in", type=Path, help="the folder that the extension must come from")
    group.addoption("--capability", help="the instruction set that it must choose")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("extension_in") is None:
        return
    from lgd_kernels import _C

    folder, capability = session.config.getoption("extension_in"), session.config.getoption("capability")
    if Path(_C.__file__).resolve().parent.parent != folder.resolve() or _C.cpu_capability() != capability:
        pytest.exit(
            f"expected the extension in {folder} with {capability}, got {_C.__file__} with {_C.cpu_capability()}", 3
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if backend_of(item) in (None, config.getoption("backend"))]
    keep_only(thinned(chosen, config.getoption("cover")), config, items)


def backend_of(item: pytest.Item) -> str | None:
    """The backend that a test runs on, where it runs on several."""
    return parameters(item).get("backend", parameters(item).get("compiled"))


def keep_only(kept: set[pytest.Item], config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the other items."""
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def thinned(items: Iterable[pytest.Item], strength: int) -> set[pytest.Item]:
    """Of every test the cases in which each combination of `strength` parameter values still occurs."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    return {cases[i] for cases in tests.values() for i in covering([_case(case) for case in cases], strength)}


def covering(cases: list[Case], strength: int) -> list[int]:
    """Positions of cases in which every combination of `strength` values occurs that occurs in all of them."""
    seen: set[tuple] = set()
    kept = []
    for i in _scattered(len(cases)):
        combinations = set(itertools.combinations(sorted(cases[i]), min(strength, len(cases[i]))))
        if not combinations <= seen:
            seen |= combinations
            kept.append(i)
    return sorted(kept)


def _scattered(count: int) -> Iterable[int]:
    """0 .. count - 1 in an order whose neighbours differ in many parameters, the same every time."""
    golden = (5**0.5 - 1) / 2
    return sorted(range(count), key=lambda i: i * golden % 1)


def parameters(item: pytest.Item) -> dict:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _case(item: pytest.Item) -> Case:
    """The parameters of a test, (name, identity of the value); the cases of one test share their values."""
    return frozenset((name, id(value)) for name, value in parameters(item).items())
