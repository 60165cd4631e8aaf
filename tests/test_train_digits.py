"""The example that is the package's main job: three ways of training on handwritten digits."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_digits.py"
WAYS = ["backpropagation", "decoupled, z", "decoupled, z and lambda"]


@pytest.fixture(scope="module")
def train_digits():
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(train_digits, threads, tmp_path, capsys):
    """main() on a small net: (what it returns, what it prints, the picture's path)."""

    def start(*options: str):
        picture = tmp_path / "folder" / "digits.png"
        runs = train_digits.main(["--depth", "2", "--width", "24", "--output", str(picture), *options])
        return runs, capsys.readouterr().out, picture

    return start


def test_all_three_ways_learn(run):
    runs, printed, picture = run("--epochs", "16")
    assert [r.name for r in runs] == WAYS
    for r in runs:
        assert len(r.accuracy) == len(r.seconds) == 16
        assert r.accuracy[-1] > 85  # guessing: 10
        assert f"{r.name:24}{r.accuracy[-1]:8.1f} %{r.cost_of_mistake:15.2f}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert str(picture) in printed


def test_the_residual_of_every_layer_is_reported(run):
    runs, printed, _ = run("--epochs", "2", "--depth", "3")
    assert runs[0].residual == []
    for r in runs[1:]:
        assert [tuple(residual.shape) for residual in r.residual] == [(3,), (3,)]
        assert all(0 < value < 1 for residual in r.residual for value in residual.tolist())
        assert f"{100 * r.residual[-1].max():.1f} %" in printed


def test_a_seed_fixes_every_number(run):
    first, again, other = (run("--epochs", "2", "--seed", seed)[0] for seed in ("3", "3", "4"))
    for a, b in zip(first, again, strict=True):
        assert (a.accuracy, a.cost_of_mistake) == (b.accuracy, b.cost_of_mistake)
        assert all(torch.equal(x, y) for x, y in zip(a.residual, b.residual, strict=True))
    assert any(not torch.equal(a.residual[0], c.residual[0]) for a, c in zip(first[1:], other[1:], strict=True))


@pytest.mark.parametrize("options", [("--H", "identity"), ("--H", "label_smoothing"), ("--activation", "tanh")])
def test_options(run, options):
    runs, printed, _ = run("--epochs", "1", *options)
    assert options[1] in printed
    assert all(math.isfinite(r.accuracy[-1]) for r in runs)


def test_help(train_digits, capsys):
    with pytest.raises(SystemExit) as stop:
        train_digits.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--depth", "--width", "--activation", "--epochs", "--seed", "--device", "--H", "--output"):
        assert option in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--activation", "sine"), "argument --activation: invalid choice: 'sine'"),
        (("--H", "cosine"), "argument --H: invalid choice: 'cosine'"),
        (("--depth", "1"), "argument --depth: must be at least 2, got 1"),
        (("--width", "0"), "argument --width: must be at least 1, got 0"),
        (("--epochs", "-3"), "argument --epochs: must be at least 1, got -3"),
        (("--epochs", "many"), "argument --epochs: expected a whole number, got 'many'"),
    ],
)
def test_refused_options(train_digits, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        train_digits.main(list(options))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
