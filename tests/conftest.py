"""The device that the tests run on, and what every test starts from. The fixtures are in shared_fixtures.py."""

from __future__ import annotations

import os

# before torch is loaded. Most loops here are so short that a thread which spins until the other is done costs more than
# both: where other processes want the cores too, 1,258 tests took 12 s of CPU instead of 25.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import interpreted_runs
import pytest
import torch
from hypothesis import settings

from tools.gates.pytest_plugin import backend_of, keep_only, thinned

settings.register_profile("tests", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests run: cpu (the default), cuda, cuda:1")
    parser.addoption("--full", action="store_true", help="run all cases of every test")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("device"))
    if device.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products with the same bits in every run
        torch.set_default_device(device)
    config.pluginmanager.register(interpreted_runs.InterpretedRuns(), "interpreted_runs")
    config.pluginmanager.import_plugin("shared_fixtures")  # not before: which backends they offer depends on the device


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests whose subject is the CPU are marked, and run only there. Of the cases of a test kernels run those in which
    three parameters' values occur together for the first time; the plain reference, which has no special cases, those
    in which two do."""
    chosen = set(items)
    if torch.get_default_device().type != "cpu":
        chosen = {item for item in chosen if not item.get_closest_marker("cpu")}
    if not config.getoption("full"):
        plain = {item for item in chosen if backend_of(item) == "reference"}
        in_order = [item for item in items if item in chosen]
        chosen = thinned([x for x in in_order if x in plain], 2) | thinned([x for x in in_order if x not in plain], 3)
    keep_only(chosen, config, items)


@pytest.fixture(autouse=True)
def _seed() -> None:
    if torch.get_default_device().type == "cpu":
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)  # without a GPU it keeps three stack traces for later: a sixth of all tests' time
