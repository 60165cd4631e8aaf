"""Data sets and nets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_digits, make_friedman1
from sklearn.model_selection import train_test_split
from torch import Tensor

import lgd_kernels as lgd
from experiments.plan import WIDTH, Run
from lgd_kernels.decoupled import LinearBlock, residual_net

TEST_PART, VALIDATION_PART = 0.2, 0.2


class Samples(NamedTuple):
    x: Tensor  # (n, features), float32
    target: Tensor  # (n,) int64 labels; (n, 1) float32 for regression


class Problem(NamedTuple):
    """Samples to train with, to choose with, and to judge by; standardized by the mean and deviation of the first."""

    train: Samples
    validation: Samples | None
    test: Samples
    n_outputs: int

    @property
    def head(self) -> str:
        return "squared" if self.train.target.is_floating_point() else "softmax_infogain"


class Source(NamedTuple):
    title: str
    load: Callable[[], tuple]
    by_feature: bool  # standardized by feature; the pixels of an image have one scale


DATA = {
    "digits": Source("digits", lambda: load_digits(return_X_y=True), by_feature=False),
    "breast_cancer": Source("breast cancer", lambda: load_breast_cancer(return_X_y=True), by_feature=True),
    "friedman1": Source(
        "Friedman 1", lambda: make_friedman1(n_samples=1500, noise=1.0, random_state=0), by_feature=True
    ),
}


def load(name: str, *, with_validation: bool) -> Problem:
    """The data set, split in the same way whatever the seed of a run."""
    source = DATA[name]
    x, target = source.load()
    is_regression = target.dtype.kind == "f"
    x, test_x, target, test_target = _split(x, target, TEST_PART, is_regression)
    validation = None
    if with_validation:
        x, validation_x, target, validation_target = _split(x, target, VALIDATION_PART, is_regression)
        validation = (validation_x, validation_target)
    of_x = (x.mean(0), x.std(0)) if source.by_feature else (x.mean(), x.std())
    of_target = (target.mean(), target.std()) if is_regression else None

    def samples(x, target) -> Samples:
        x = torch.as_tensor((x - of_x[0]) / of_x[1], dtype=torch.float32)
        if of_target is None:
            return Samples(x, torch.as_tensor(target, dtype=torch.int64))
        target = torch.as_tensor((target - of_target[0]) / of_target[1], dtype=torch.float32)
        return Samples(x, target.unsqueeze(1))

    n_outputs = 1 if is_regression else int(target.max()) + 1
    held_back = None if validation is None else samples(*validation)
    return Problem(samples(x, target), held_back, samples(test_x, test_target), n_outputs)


def _split(x, target, part: float, is_regression: bool) -> list:
    return train_test_split(x, target, test_size=part, random_state=0, stratify=None if is_regression else target)


def plain_net(n_inputs: int, width: int, depth: int, n_outputs: int, gain: float) -> list[LinearBlock]:
    """A tanh net of `depth` hidden values without skips, the weights of every layer N(0, gain^2 / fan-in)."""
    widths = [n_inputs, *[width] * depth, n_outputs]
    return [
        LinearBlock(
            d_in,
            d_out,
            activation="tanh" if t < depth else "identity",
            preactivation=False,
            skip=0.0,
            branch_scale=gain * d_in**-0.5,
        )
        for t, (d_in, d_out) in enumerate(itertools.pairwise(widths))
    ]


class Net(NamedTuple):
    title: str
    layers: Callable[[int, int, int, int], list[LinearBlock]]  # of n_inputs, width, hidden values, n_outputs
    width: int = WIDTH


NETS = {
    "residual": Net("residual ReLU nets", residual_net),
    "linear": Net("linear residual nets", lambda *sizes: residual_net(*sizes, activation="identity"), width=16),
    "half_scale": Net("tanh, weights at half scale", lambda *sizes: plain_net(*sizes, gain=0.5)),
    "gain_3": Net("tanh, weights at 3 times the scale", lambda *sizes: plain_net(*sizes, gain=3.0)),
}


def network(run: Run, problem: Problem) -> lgd.DecoupledNetwork:
    """The net of a run, its weights drawn with the run's seed."""
    torch.manual_seed(run.seed)
    net = NETS[run.net]
    layers = net.layers(problem.train.x.shape[1], net.width, run.layers - 1, problem.n_outputs)
    return lgd.DecoupledNetwork(layers, head=problem.head)
