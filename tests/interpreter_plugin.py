"""A pytest plugin (`-p interpreter_plugin`) that runs tests of softmax_infogain on the Triton kernels in Triton's
interpreter (TRITON_INTERPRET=1): thinned, with `--tiles=small` on tiles so small that every row takes several."""

from __future__ import annotations

import dataclasses

import pytest

from tools.gates.pytest_plugin import keep_only, thinned

# about compiled code (fixtures), or minutes long in the interpreter
_FIXTURES = {"compiled", "threads"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("interpreter")
    group.addoption("--pairs-of", default="", help="the tests of which all pairs of parameter values are kept")
    group.addoption("--tiles", choices=("small", "as-launched"), default="as-launched")


def pytest_configure(config: pytest.Config) -> None:
    from lgd_kernels.triton_kernels import common, softmax_infogain

    assert common.INTERPRETED
    if config.getoption("tiles") == "small":
        small = dataclasses.replace(common.tiles_for(1, 1, None, 90), rows=2, classes=8, whole=False)
        softmax_infogain.tiles_for = lambda *args: small


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    possible = [item for item in items if not _FIXTURES & set(item.fixturenames)]
    pairs = config.getoption("pairs_of").split(",")
    keep_only(
        thinned([item for item in possible if item.originalname in pairs], 2)
        | thinned([item for item in possible if item.originalname not in pairs], 1),
        config,
        items,
    )
