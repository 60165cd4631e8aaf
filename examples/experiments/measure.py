"""One run, and what is measured in it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

import lgd_kernels as lgd
from experiments.plan import BATCH_SIZE, MODES, Experiment, Run
from experiments.problems import Problem, Samples, load, network
from experiments.results import Result
from lgd_kernels.decoupled import Callback, Training, parameter_groups

PAIRS = 15  # of a visit and a step of backpropagation, of which the cost is the median
CONVERGED = 1e-6  # relative error at which a linear net needs no more steps


def measure(experiment: Experiment, run: Run) -> Result:
    """Make a run of an experiment, on one thread: at these sizes more of them wait for each other."""
    torch.set_num_threads(1)
    problem = load(run.data, with_validation=experiment.is_tuned)
    values = MEASUREMENTS[experiment.measure](run, problem)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return Result(run, date, torch.__version__, torch.backends.cpu.get_cpu_capability(), **values)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Curve(Callback):
    """The score after every epoch, and the CPU seconds without those that it takes to judge the net."""

    def __init__(self, test: Samples):
        self.test, self.scores = test, []
        self.burn_in_seconds, self._judging, self._began = math.nan, 0.0, time.process_time()

    def on_batch_end(self, training: Training) -> None:
        if training.step == 1:
            self.burn_in_seconds = self.seconds  # and the first visit

    def on_epoch_end(self, training: Training) -> None:
        start = time.process_time()
        self.scores.append(score(training.net, self.test))
        self._judging += time.process_time() - start

    @property
    def seconds(self) -> float:
        return time.process_time() - self._began - self._judging


def train(run: Run, problem: Problem) -> dict[str, Any]:
    net = network(run, problem)
    optimizer = torch.optim.Adam(parameter_groups(net, run.learning_rate), fused=True)
    curve = Curve(problem.test)
    lgd.fit(
        net,
        tuple(problem.train),
        epochs=run.epochs,
        optimizer=optimizer,
        mode=MODES[run.mode],
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs),
        batch_size=BATCH_SIZE,
        seed=run.seed,
        callbacks=[curve],
        progress=False,
    )
    seconds = curve.seconds
    return {
        "score": curve.scores[-1],
        "loss": float(net.loss(*problem.test).detach()),
        "validation_score": math.nan if problem.validation is None else score(net, problem.validation),
        "seconds": seconds,
        "burn_in_seconds": curve.burn_in_seconds,
        "curve": tuple(curve.scores),
    }


@torch.no_grad()
def score(net: lgd.DecoupledNetwork, samples: Samples) -> float:
    """In percent, see `Result`. A net whose output is not finite explains nothing."""
    output = net(samples.x)
    if net.head == "softmax_infogain":
        return 100 * float((output.argmax(1) == samples.target).float().mean())
    explained = 1 - (output - samples.target).square().mean() / samples.target.var(correction=0)
    return 100 * max(float(explained), 0.0) if explained.isfinite() else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# One minibatch
# ---------------------------------------------------------------------------------------------------------------------


def first_minibatch(problem: Problem, n: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
    return problem.train.x[:n], problem.train.target[:n]


def compare_gradients(run: Run, problem: Problem) -> dict[str, Any]:
    """The gradients of a visit that does not move the weights with those of backpropagation, layer by layer."""
    net, (x, target) = network(run, problem), first_minibatch(problem)
    mode = MODES[run.mode]
    numbers = mode.start_epoch(net, 0, x, target, None, None)
    start = time.process_time()
    mode.visit_(net, x, target, None, None, None, numbers)
    seconds = time.process_time() - start
    local = _gradients(net)
    net.zero_grad()
    net.loss(x, target).backward()
    true = _gradients(net)
    return {
        "cosine": tuple(float(a @ b / (a.norm() * b.norm())) for a, b in zip(local, true, strict=True)),
        "norm_ratio": tuple(float(a.norm() / b.norm()) for a, b in zip(local, true, strict=True)),
        "seconds": seconds,
    }


def _gradients(net: lgd.DecoupledNetwork) -> list[Tensor]:
    """Of every layer, all its parameters as one vector."""
    return [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in net.layers]


def time_visits(run: Run, problem: Problem) -> dict[str, Any]:
    """A minibatch in the mode of the run and a step of backpropagation by turns, so that both meet the same machine."""
    x, target = first_minibatch(problem)
    visit, step = (_timed(network(run, problem), mode, x, target) for mode in (run.mode, "backpropagation"))
    start = time.process_time()
    visit(), step()  # the first calls on a shape cost more
    visits, steps = zip(*((visit(), step()) for _ in range(PAIRS)), strict=True)
    return {
        "milliseconds": 1000 * statistics.median(visits),
        "backpropagation_milliseconds": 1000 * statistics.median(steps),
        "seconds": time.process_time() - start,
    }


def _timed(net: lgd.DecoupledNetwork, mode_name: str, x: Tensor, target: Tensor) -> Callable[[], float]:
    """A function that trains on the minibatch as in an epoch, and returns the CPU seconds."""
    mode, optimizer = MODES[mode_name], torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    z = net.hidden_values(x) if mode.keeps_values else None
    multiplier = [torch.zeros_like(value) for value in z] if mode.keeps_multipliers else None
    numbers = mode.start_epoch(net, 0, x, target, z, multiplier)

    def timed() -> float:
        start = time.process_time()  # of one thread: whatever else the machine does
        for _ in range(mode.visits):
            mode.visit_(net, x, target, z, multiplier, optimizer, numbers)
        return time.process_time() - start

    return timed


def converge(run: Run, problem: Problem) -> dict[str, Any]:
    """The error of the gradient while z and multipliers of a minibatch move and the weights do not, in float64."""
    net = network(run, problem).double()
    x, target = (part.double() for part in first_minibatch(problem, 16))
    net.loss(x, target).backward()
    true = torch.cat(_gradients(net))
    z = net.hidden_values(x)
    multiplier = [torch.zeros_like(value) for value in z]
    step_size = 1 / net.largest_curvature(x, z, target)
    errors, done, start = [], 0, time.process_time()
    for steps in (run.layers * 2**k for k in range(8 + run.layers.bit_length())):
        net.visit_(x, z, target, multiplier=multiplier, step_size=step_size, steps=steps - done, dual_step=1.0)
        done = steps
        errors.append(float((torch.cat(_gradients(net)) - true).norm() / true.norm()))
        if errors[-1] < CONVERGED:
            break
    return {"relative_error": tuple(errors), "seconds": time.process_time() - start}


MEASUREMENTS: dict[str, Callable[[Run, Problem], dict[str, Any]]] = {
    "training": train,
    "gradient": compare_gradients,
    "cost": time_visits,
    "linear": converge,
}
