"""The ways to train a DecoupledNetwork."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import lgd_kernels as lgd
from lgd_kernels.decoupled import Backpropagation, EpochNumbers, ReinitializedValues, StoredValues, residual_net

N = 6


def make():
    """(net of 4 layers, x, labels)."""
    return lgd.DecoupledNetwork(residual_net(5, 8, 3, 3, "tanh")), torch.randn(N, 5), torch.randint(3, (N,))


def stored(net, x):
    z = net.hidden_values(x)
    return z, [torch.zeros_like(value) for value in z]


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def gradients(net):
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize(
    ("mode", "keeps"),
    [
        (StoredValues(), (True, True)),
        (StoredValues(multipliers=False), (True, False)),
        (ReinitializedValues(), (False, False)),
        (Backpropagation(), (False, False)),
    ],
    ids=lambda value: str(value),
)
def test_what_is_kept(mode, keeps):
    """A mode works with what it says it keeps, and is a value: nothing in it changes."""
    assert (mode.keeps_values, mode.keeps_multipliers) == keeps
    net, x, labels = make()
    z, multiplier = (kept if keep else None for kept, keep in zip(stored(net, x), keeps, strict=True))
    numbers = mode.start_epoch(net, 0, x, labels, z, multiplier)
    optimizer, before = torch.optim.Adam(net.parameters(), lr=0.01), net.loss(x, labels).item()
    for _ in range(20):
        visit = mode.visit_(net, x, labels, z, multiplier, optimizer, numbers)
        assert visit.energies.shape == (4,) and visit.residual_norm.shape == visit.value_norm.shape == (3,)
    assert net.loss(x, labels) < 0.8 * before
    assert mode == dataclasses.replace(mode) and hash(mode) == hash(dataclasses.replace(mode))


def test_stored_values_move_in_place():
    net, x, labels = make()
    z, multiplier = stored(net, x)
    expected_z, expected_multiplier = clones(z), clones(multiplier)
    numbers = EpochNumbers(rho=0.5, dual_step=0.25, step_size=0.3)
    visit = StoredValues(steps=3).visit_(net, x, labels, z, multiplier, None, numbers)
    got = gradients(net)
    expected = net.visit_(
        x, expected_z, labels, multiplier=expected_multiplier, rho=0.5, dual_step=0.25, step_size=0.3, steps=3
    )
    assert torch.equal(visit.energies, expected.energies)
    assert all(map(torch.equal, z, expected_z)) and all(map(torch.equal, multiplier, expected_multiplier))
    assert all(torch.equal(got[name], parameter.grad) for name, parameter in net.named_parameters())


def test_burn_in_moves_z_alone():
    net, x, labels = make()
    z, multiplier = stored(net, x)
    before, parameters = clones(z), copy.deepcopy(net.state_dict())
    numbers = EpochNumbers(rho=0.5, dual_step=0.25, step_size=0.3)
    StoredValues(burn_in=2).burn_in_(net, x, labels, z, multiplier, numbers)
    for _ in range(2):
        for value, gradient in zip(before, net.hidden_gradient(x, before, labels, rho=0.5), strict=True):
            value -= 0.3 * gradient
    torch.testing.assert_close(z, before)
    assert all(value.eq(0).all() for value in multiplier)
    assert all(torch.equal(value, parameters[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_reinitialized_values_begin_as_the_net_fed_forward():
    net, x, labels = make()
    mode, numbers = ReinitializedValues(), EpochNumbers(rho=1.0, dual_step=1.0, step_size=0.3)
    visit = mode.visit_(net, x, labels, None, None, None, numbers)
    got = gradients(net)
    z, multiplier = stored(net, x)
    expected = net.visit_(x, z, labels, multiplier=multiplier, dual_step=1.0, step_size=0.3, steps=16)  # 4 for a layer
    assert torch.equal(visit.energies, expected.energies)
    assert all(torch.equal(got[name], parameter.grad) for name, parameter in net.named_parameters())


def test_backpropagation():
    net, x, labels = make()
    visit = Backpropagation().visit_(net, x, labels, None, None, None, EpochNumbers())
    got = gradients(net)
    net.zero_grad()
    nn.functional.cross_entropy(net(x), labels).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)
    assert visit.energies[:-1].eq(0).all() and visit.residual_norm.eq(0).all() and visit.value_norm.isnan().all()
    torch.testing.assert_close(visit.energies[-1], N * net.loss(x, labels).detach())
    again = Backpropagation().visit_(net, x, labels, None, None, torch.optim.SGD(net.parameters(), 0.1), EpochNumbers())
    assert torch.equal(again.energies, visit.energies)  # not accumulated, and from before the step
    assert net.loss(x, labels) * N < again.energies[-1]


@pytest.mark.parametrize("mode", [StoredValues, ReinitializedValues])
def test_numbers_of_an_epoch(mode):
    """Schedules are asked for the epoch, and the step follows the curvature."""
    net, x, labels = make()
    z, multiplier = stored(net, x)
    numbers = mode(rho=lambda epoch: 0.5 / (epoch + 1), dual_step=lambda epoch: 0.1 * epoch).start_epoch(
        net, 1, x, labels, z, multiplier
    )
    assert (numbers.rho, numbers.dual_step) == (0.25, 0.1)
    assert numbers.step_size == 1 / net.largest_curvature(x, z, labels, multiplier=multiplier, rho=0.25)


def test_defaults():
    net, x, labels = make()
    z, multiplier = stored(net, x)
    assert StoredValues(rho=0.2).start_epoch(net, 0, x, labels, z, multiplier).dual_step == 0.1
    assert ReinitializedValues().start_epoch(net, 0, x, labels, None, None)[:2] == (1.0, 1.0)
    assert Backpropagation().start_epoch(net, 0, x, labels, None, None) == EpochNumbers()


@pytest.mark.parametrize("mode", [StoredValues(), ReinitializedValues(), Backpropagation()])
def test_a_net_without_hidden_values(mode):
    """Nothing to step: all are backpropagation."""
    net, x, labels = lgd.DecoupledNetwork([nn.Linear(5, 3)]), torch.randn(N, 5), torch.randint(3, (N,))
    numbers = mode.start_epoch(net, 0, x, labels, [], [])
    assert numbers.step_size == 0
    mode.visit_(net, x, labels, [], [], None, numbers)
    got = gradients(net)
    net.zero_grad()
    nn.functional.cross_entropy(net(x), labels).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)


@pytest.mark.parametrize("mode", [StoredValues, ReinitializedValues])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: must not be negative, got -1"),
        ({"steps": 1.5}, TypeError, r"steps: expected an int, got float 1\.5"),
        ({"rho": "large"}, TypeError, "rho: expected a number, got str 'large'"),
        ({"rho": 0.5, "dual_step": 0.6}, ValueError, "dual_step: must not be larger than rho, got 0.6 and 0.5"),
        ({"dual_step": -0.1}, ValueError, "dual_step: must not be negative, got -0.1"),
    ],
)
def test_refused_options(mode, options, error, message):
    with pytest.raises(error, match=message):
        mode(**options)


def test_refused_visits():
    with pytest.raises(ValueError, match="visits: must be at least 1, got 0"):
        StoredValues(visits=0)
    with pytest.raises(TypeError, match=r"visits: expected an int, got float 2\.0"):
        StoredValues(visits=2.0)


@pytest.mark.parametrize("mode", [StoredValues, ReinitializedValues])
def test_refused_schedules(mode):
    net, x, labels = make()
    z, multiplier = stored(net, x)
    falling = mode(rho=lambda epoch: 0.5**epoch, dual_step=0.5)
    falling.start_epoch(net, 1, x, labels, z, multiplier)
    message = r"dual_step \(epoch 2\): must not be larger than rho, got 0.5 and 0.25"
    with pytest.raises(ValueError, match=message):
        falling.start_epoch(net, 2, x, labels, z, multiplier)
