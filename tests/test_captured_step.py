"""capture_step: the same visits as decoupled_step_. Where there is no CUDA device, a recorded call plays the graph: the
op that is called while it is captured does nothing then, and runs at every replay."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from device import ON_CPU
from step_nets import ALL, assert_same, clone, gradients, make, parameters, same, step

import lgd_kernels as lgd
from lgd_kernels.decoupled import CapturedStep, decoupled_step
from lgd_kernels.decoupled.captured_step import torch as torch_of_module

OPTIMIZERS = {
    "sgd": lambda of: torch.optim.SGD(of, lr=0.1),
    "momentum": lambda of: torch.optim.SGD(of, lr=0.1, momentum=0.9),
    "adam": lambda of: torch.optim.Adam(of, lr=0.02),
}
OPTIONS = {"step_size": 0.1, "steps": 2}
VISITS = 5


class RecordedGraph:
    """Takes the place of torch.cuda.CUDAGraph: the op's calls, which write their energies where the first one did."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for op, args, energies in self.calls:
            energies.copy_(op(*args))


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that have been captured. On a CUDA device they are real ones, and not listed."""
    captured = []
    if not ON_CPU:
        return captured

    @contextlib.contextmanager
    def capture(graph):
        captured.append(graph)
        op_for = decoupled_step._op_for

        def recording_op_for(tensors):
            def record(x, *args):
                energies = x.new_full((len(weight_layers(args)),), torch.nan)
                graph.calls.append((op_for(tensors), (x, *args), energies))
                return energies

            return record

        with monkeypatch.context() as patch:
            patch.setattr(decoupled_step, "_op_for", recording_op_for)
            yield

    monkeypatch.setattr(torch_of_module.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch_of_module.cuda, "graph", capture)
    monkeypatch.setattr(CapturedStep, "_on_cuda", lambda self: True)
    return captured


def weight_layers(args_after_x):
    return [layer for stack in args_after_x[4] for layer in stack]


def net_and_copy(**options):
    tensors = make((4, 6, 6, 3), dtype=torch.float32, **options)
    return tensors, clone(tensors)


def put(tensors, others):
    """Other samples, in place."""
    for name in ("x", "target"):
        tensors[name].copy_(others[name])
    for name in ("z", "multiplier"):
        for to, value in zip(tensors[name], others[name], strict=True):
            to.copy_(value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_visits_of_other_samples_with_a_schedule(graphs, name):
    """Values, buffers, step counts and energies, bit for bit; the learning rate falls from visit to visit."""
    captured, ordinary = net_and_copy()
    nets = [(captured, OPTIMIZERS[name](parameters(captured))), (ordinary, OPTIMIZERS[name](parameters(ordinary)))]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for _, optimizer in nets]
    visit = lgd.capture_step(**captured, optimizer=nets[0][1], **OPTIONS)
    for _ in range(VISITS):
        batch = make((4, 6, 6, 3), dtype=torch.float32)
        for tensors, _ in nets:
            put(tensors, batch)
        assert same(visit(), step(ordinary, optimizer=nets[1][1], **OPTIONS))
        assert_same(captured, ordinary)
        for schedule in schedules:
            schedule.step()
    states = [[optimizer.state[p] for p in parameters(tensors)] for tensors, optimizer in nets]
    for of_captured, of_ordinary in zip(*states, strict=True):
        assert all(same(torch.as_tensor(of_captured[key]), torch.as_tensor(of_ordinary[key])) for key in of_ordinary)
    assert len(graphs) == ON_CPU


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_are_where_they_belong(graphs, set_to_none):
    captured, ordinary = net_and_copy()
    visit = lgd.capture_step(**captured, **OPTIONS)
    for _ in range(VISITS):
        visit(), step(ordinary, **OPTIONS)
        assert all(same(a, b) for a, b in zip(gradients(captured), gradients(ordinary), strict=True))
        for p in parameters(captured):
            p.grad = None if set_to_none else p.grad.zero_()
    assert len(graphs) == ON_CPU


def test_new_buffers_of_the_optimizer_are_captured_anew(graphs):
    captured, ordinary = net_and_copy()
    optimizers = [torch.optim.Adam(parameters(tensors), lr=0.02) for tensors in (captured, ordinary)]
    visit = lgd.capture_step(**captured, optimizer=optimizers[0], **OPTIONS)
    for _ in range(VISITS):
        visit(), step(ordinary, optimizer=optimizers[1], **OPTIONS)
        assert_same(captured, ordinary)
        for optimizer in optimizers:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(graphs) == ON_CPU * (VISITS - 1)


def test_the_residual_too(graphs):
    captured, ordinary = net_and_copy()
    visit = lgd.capture_step(**captured, **OPTIONS, return_residual=True)
    for _ in range(VISITS):
        expected = step(ordinary, **OPTIONS, return_residual=True)
        energies, residual = visit()
        assert same(energies, expected[0]) and all(map(same, residual, expected[1]))


def test_autograd_notices_what_has_changed(graphs):
    captured, _ = net_and_copy()
    optimizer = torch.optim.SGD(parameters(captured), lr=0.1)
    visit = lgd.capture_step(**captured, optimizer=optimizer, **OPTIONS)
    for _ in range(VISITS):
        changing = [*parameters(captured), *captured["z"], *captured["multiplier"]]
        before = [tensor._version for tensor in changing]
        visit()
        assert all(tensor._version > version for tensor, version in zip(changing, before, strict=True))


def test_on_any_device_it_is_an_ordinary_visit():
    """Without a graph in its place."""
    captured, ordinary = net_and_copy()
    visit = lgd.capture_step(**captured, **OPTIONS)
    for _ in range(3):
        assert same(visit(), step(ordinary, **OPTIONS))
        assert_same(captured, ordinary, ALL)


def test_unknown_and_missing_arguments():
    tensors, _ = net_and_copy()
    with pytest.raises(TypeError, match="'steps_size'"):
        lgd.capture_step(**tensors, step_size=0.1, steps_size=0.1)
    with pytest.raises(TypeError, match="'step_size'"):
        lgd.capture_step(**tensors)


def test_the_first_call_checks_values():
    tensors, _ = net_and_copy()
    with pytest.raises(ValueError, match="steps: "):
        lgd.capture_step(**tensors, step_size=0.1, steps=-1)()
