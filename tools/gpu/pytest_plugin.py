"""A pytest plugin (`-p tools.gpu.pytest_plugin`) for the tests on a device: which of them this process runs.

A kernel of Triton's is compiled when it is first called, a second or more for every variant, and the tests ask for
thousands of variants. So of the tests on the `triton` backend those are left out whose pairs of parameter values others
have already; with `--quick` on every backend those whose single values others have.
"""

from __future__ import annotations

import pytest

from tools.gates.pytest_plugin import backend_of, keep_only, thinned


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--share", default="1/1", help="of the tests, every n-th one, for instance 3/16")
    group.addoption("--quick", action="store_true", help="every value of every parameter once")


@pytest.hookimpl(trylast=True)  # after what is not for a device is gone
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        chosen = thinned(items, 1)
    else:
        of_triton = [item for item in items if backend_of(item) == "triton"]
        chosen = {item for item in items if backend_of(item) != "triton"} | thinned(of_triton, 2)
    number, shares = map(int, config.getoption("share").split("/"))
    keep_only(set([item for item in items if item in chosen][number - 1 :: shares]), config, items)
