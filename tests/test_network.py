"""DecoupledNetwork: against a plain decoupled net with autograd (plain_network.py), and what is known exactly."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from plain_network import (
    Options,
    adjoint,
    assert_close,
    fed_forward,
    in_float64,
    plain_results,
    plain_visit_,
    random_batch,
)
from small_networks import NETS, N, Residual, make, unfused
from torch import nn

import lgd_kernels as lgd
from lgd_kernels.decoupled import LinearBlock, network, parameter_groups, residual_net
from lgd_kernels.decoupled.layers import chain_of, linear_layer

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="sum")
by_net = pytest.mark.parametrize("name", NETS)
by_path = pytest.mark.parametrize("path", [lambda net: net, unfused], ids=["fused", "by modules"])


# ---------------------------------------------------------------------------------------------------------------------
# Against autograd
# ---------------------------------------------------------------------------------------------------------------------


def check_point(net, batch, options=None, rho=0.7):
    """Energies and all gradients at a point are what autograd makes of the energy."""
    options = (options or Options())._replace(rho=rho)
    exact = plain_results(in_float64(net), batch.to(torch.float64), options)
    plain = plain_results(net, batch, options)
    of_z = net.hidden_gradient(batch.x, batch.z, batch.target, multiplier=batch.multiplier, rho=rho)
    energies = net.local_gradient_(batch.x, batch.z, batch.target, multiplier=batch.multiplier, rho=rho)
    assert_close(energies, torch.stack(exact.energies), torch.stack(plain.energies), "energies")
    for t, (got, *expected) in enumerate(zip(of_z, exact.of_z, plain.of_z, strict=True)):
        assert_close(got, *expected, f"dE/dz[{t}]")
    for name, parameter in net.named_parameters():
        assert_close(parameter.grad, exact.of_parameters[name] / N, plain.of_parameters[name] / N, f"dE/d {name}")


@by_net
@by_path
@pytest.mark.parametrize("multiplier", [True, False], ids=["with multipliers", "without"])
def test_energies_and_gradients(name, path, multiplier):
    net, x, labels = make(name)
    check_point(path(net), random_batch(net, x, labels, multiplier=multiplier))


HUBER = nn.HuberLoss(reduction="none", delta=0.4)


def squared_head(output, target):
    return 0.5 * (output - target).square().sum()


def infogain_head(matrix, ignore_index):
    def head(output, target):
        kept = target != ignore_index
        return -(matrix.to(output.dtype)[target[kept]] * output[kept].log_softmax(1)).sum()

    return head


@by_path
def test_huber(path):
    net, x, labels = make("mixed", hidden_loss="huber", kappa=0.4)
    check_point(path(net), random_batch(net, x, labels), Options(hidden_loss=HUBER, factor=1.0))


@by_path
def test_squared_head(path):
    net, x, _ = make("linear", head="squared")
    check_point(path(net), random_batch(net, x, torch.randn(N, 3)), Options(head=squared_head))


@by_path
def test_infogain_head_and_ignored_samples(path):
    matrix = 3 * torch.rand(3, 3)
    net, x, labels = make("linear", H=lgd.Infogain.dense(matrix), ignore_index=1)
    labels[:2] = torch.tensor([1, 2])
    head = infogain_head(matrix, 1)
    check_point(path(net), random_batch(net, x, labels), Options(head=head))
    torch.testing.assert_close(net.loss(x, labels), head(net(x), labels) / N)


@pytest.mark.parametrize(
    ("activation", "is_known"),
    [
        *((module, True) for module in (nn.Identity(), nn.ReLU(), nn.Sigmoid(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU())),
        *((module, True) for module in (nn.GELU(), nn.GELU(approximate="tanh"))),
        *((module, False) for module in (nn.LeakyReLU(0.2), nn.Softplus(), nn.PReLU(), nn.Dropout(0.0))),
    ],
    ids=lambda value: str(value),
)
def test_activations(activation, is_known):
    net = lgd.DecoupledNetwork([nn.Linear(5, 4), activation, nn.Linear(4, 3)])
    assert (linear_layer(chain_of(net.layers[0])) is not None) == is_known
    check_point(net, random_batch(net, torch.randn(N, 5), torch.randint(3, (N,))))


def test_rho_of_every_hidden_value():
    net, x, labels = make("mixed")
    batch = random_batch(net, x, labels, multiplier=False)
    rhos = [0.1 * (t + 1) for t in range(len(batch.z))]
    energies = net.evaluation(batch.x, batch.z, batch.target, rho=rhos).energies
    ones = net.evaluation(batch.x, batch.z, batch.target).energies
    torch.testing.assert_close(energies, ones * torch.tensor([*rhos, 1.0]))


def test_labels_of_positions():
    """A head for every pixel: outputs (n, C, h, w)."""
    net = lgd.DecoupledNetwork([nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)])
    x, labels = torch.randn(N, 2, 5, 5), torch.randint(3, (N, 5, 5))
    check_point(net, random_batch(net, x, labels))


def test_integers_as_input():
    net = lgd.DecoupledNetwork([nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)])
    check_point(net, random_batch(net, torch.randint(10, (N, 3)), torch.randint(3, (N,))))


def test_linear_layers_over_sequences():
    """nn.Linear takes more than two dimensions."""
    net = lgd.DecoupledNetwork([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Flatten(), nn.Linear(10, 3)])
    check_point(net, random_batch(net, torch.randn(N, 2, 4), torch.randint(3, (N,))))


def test_parametrized_layers():
    """An nn.Linear whose weight is computed from other parameters is called, not fused."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    net = lgd.DecoupledNetwork([nn.Linear(5, 4), layer, nn.Tanh(), nn.Linear(4, 3)])
    check_point(net, random_batch(net, torch.randn(N, 5), torch.randint(3, (N,))))


# ---------------------------------------------------------------------------------------------------------------------
# What is known exactly
# ---------------------------------------------------------------------------------------------------------------------


ROUNDING = 1e-12  # float64: less than a thousand roundings, of terms of the order of 1


@by_net
@by_path
def test_at_the_adjoint_gradients_are_those_of_backpropagation(name, path):
    net, x, labels = make(name)
    net = net.double()
    batch, gradients = adjoint(net, x.double(), labels, CROSS_ENTROPY)
    net = path(net)
    of_z = net.hidden_gradient(*batch[:3], multiplier=batch.multiplier)
    net.local_gradient_(*batch[:3], multiplier=batch.multiplier)
    for got, lambda_ in zip(of_z, batch.multiplier, strict=True):
        assert got.abs().max() < ROUNDING < 1e-6 * lambda_.abs().max()
    for (key, parameter), expected in zip(net.named_parameters(), gradients.values(), strict=True):
        torch.testing.assert_close(parameter.grad, expected / N, rtol=ROUNDING, atol=ROUNDING, msg=key)


@by_net
def test_finite_differences(name):
    net, x, labels = make(name)
    batch, net = random_batch(net, x, labels).to(torch.float64), net.double()
    direction = [torch.randn_like(value) for value in batch.z]

    def energy(h):
        z = [value + h * d for value, d in zip(batch.z, direction, strict=True)]
        return net.evaluation(x.double(), z, labels, multiplier=batch.multiplier, rho=0.7).energies.sum()

    def difference(h):
        return (energy(h) - energy(-h)) / (2 * h)

    gradient = net.hidden_gradient(x.double(), batch.z, labels, multiplier=batch.multiplier, rho=0.7)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    h = 1e-5
    truncation, rounding = (difference(2 * h) - difference(h)).abs(), 1e-15 * energy(0).abs() / h
    assert (slope - difference(h)).abs() < truncation + rounding
    assert truncation + rounding < 1e-6 * slope.abs()  # or this says nothing


def test_linear_net_converges_to_backpropagation():
    """Fixed weights: the multipliers become backpropagation's adjoint."""
    net = lgd.DecoupledNetwork([nn.Linear(6, 6) for _ in range(4)]).double()
    x, labels = torch.randn(N, 6, dtype=torch.float64), torch.randint(6, (N,))
    z = net.hidden_values(x)
    multiplier = [torch.zeros_like(value) for value in z]
    step_size = 1 / net.largest_curvature(x, z, labels)
    for _ in range(40):
        net.visit_(x, z, labels, multiplier=multiplier, step_size=step_size, steps=100, dual_step=0.2)
    _, gradients = adjoint(net, x, labels, CROSS_ENTROPY)
    for name, parameter in net.named_parameters():
        expected = gradients[name] / N
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name


# ---------------------------------------------------------------------------------------------------------------------
# Visits
# ---------------------------------------------------------------------------------------------------------------------

VISIT = {"step_size": 0.1, "steps": 3, "dual_step": 0.2}


def check_visit(net, path, batch, options=None):
    """Everything after a visit is what plain PyTorch makes of it."""
    options = (options or Options())._replace(rho=0.7)
    wide, plain = batch.to(torch.float64), batch.to(torch.float32)
    expected = plain_visit_(in_float64(net), wide, options, **VISIT)
    yardstick = plain_visit_(net, plain, options, **VISIT)

    net = path(net)
    visit = net.visit_(*batch[:3], multiplier=batch.multiplier, rho=0.7, **VISIT)
    assert_close(visit.energies, torch.stack(expected.energies), torch.stack(yardstick.energies), "energies")
    for name in ("z", "multiplier") if batch.multiplier else ("z",):
        for t, tensors in enumerate(zip(*(getattr(b, name) for b in (batch, wide, plain)), strict=True)):
            assert_close(*tensors, f"{name}[{t}]")
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, expected.of_parameters[name] / N, yardstick.of_parameters[name] / N, name)
        else:
            assert parameter.grad is None
    residuals, values = [r.residuals for r in (expected, yardstick)], [wide.z, plain.z]
    for got, tensors, what in ((visit.residual_norm, residuals, "residual"), (visit.value_norm, values, "value")):
        assert_close(got, *(torch.stack([v.norm() for v in vs]) for vs in tensors), f"{what}_norm")


@by_net
@by_path
@pytest.mark.parametrize("multiplier", [True, False], ids=["with multipliers", "without"])
def test_visit(name, path, multiplier):
    net, x, labels = make(name)
    check_visit(net, path, random_batch(net, x, labels, multiplier=multiplier))


@by_path
def test_visit_with_options(path):
    """Of the head, and of the hidden loss."""
    matrix = 3 * torch.rand(3, 3)
    H, huber = lgd.Infogain.dense(matrix), {"hidden_loss": "huber", "kappa": 0.4}
    net, x, labels = make("linear", H=H, ignore_index=1, **huber)
    options = Options(head=infogain_head(matrix, 1), hidden_loss=HUBER, factor=1.0)
    labels[:2] = torch.tensor([1, 2])
    check_visit(net, path, random_batch(net, x, labels), options)
    net, x, _ = make("linear", head="squared", **huber)
    check_visit(net, path, random_batch(net, x, torch.randn(N, 3)), options._replace(head=squared_head))


@by_path
def test_visit_with_an_activation_and_a_skip_in_the_last_layer(path):
    """Which a squared head allows."""
    last = LinearBlock(4, 4, activation="tanh", preactivation=False, skip=0.5, branch_scale=0.3)
    net = lgd.DecoupledNetwork([nn.Linear(5, 4), nn.Tanh(), last], head="squared")
    batch = random_batch(net, torch.randn(N, 5), torch.randn(N, 4))
    check_visit(net, path, batch, Options(head=squared_head))


@by_path
def test_the_default_step_of_the_multiplier_is_half_the_smallest_rho(path):
    net, x, labels = make("linear")
    net, batch = path(net), random_batch(net, x, labels)
    same, rhos = batch.to(torch.float32), [0.8, 0.6]
    net.visit_(*batch[:3], multiplier=batch.multiplier, step_size=0.1, rho=rhos)
    net.visit_(*same[:3], multiplier=same.multiplier, step_size=0.1, rho=rhos, dual_step=0.3)
    assert all(map(torch.equal, batch.multiplier, same.multiplier))


@pytest.mark.parametrize(
    ("name", "calls"), [("linear", 1), ("residual", 1), ("mixed", 0), ("convolutions", 0)], ids=lambda value: str(value)
)
def test_a_net_of_linear_layers_is_one_call(monkeypatch, name, calls):
    net, x, labels = make(name)
    seen = []
    original = network.decoupled_step_
    monkeypatch.setattr(network, "decoupled_step_", lambda *a, **k: seen.append(1) or original(*a, **k))
    batch = random_batch(net, x, labels)
    net.visit_(*batch[:3], multiplier=batch.multiplier, **VISIT)
    assert len(seen) == calls


def unlike(change):
    """The linear chain, changed so that one call cannot do it."""
    net, x, labels = make("linear")
    modules = [module for layer in net.layers for module in layer]
    if change == "no bias in one layer":
        modules[2] = nn.Linear(7, 6, bias=False)
    elif change == "frozen weight":
        modules[2].weight.requires_grad_(False)
    elif change == "shared layer":
        modules[2:4] = [nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh()]
        modules[4] = modules[2]
        modules.insert(6, nn.Linear(7, 6))
    elif change == "activation in the head":
        modules.append(nn.Tanh())
    elif change == "skip in the head":
        modules[4] = LinearBlock(6, 6, activation="identity", preactivation=False, skip=0.5, branch_scale=1.0)
    elif change == "both places of the activation":
        modules[2:4] = [LinearBlock(7, 6, activation="tanh", preactivation=True, skip=0.0, branch_scale=0.5)]
    return lgd.DecoupledNetwork(modules), x, labels


CHANGES = (
    "no bias in one layer",
    "frozen weight",
    "shared layer",
    "activation in the head",
    "skip in the head",
    "both places of the activation",
)


@pytest.mark.parametrize("change", CHANGES)
def test_nets_of_linear_layers_that_are_no_single_call(monkeypatch, change):
    monkeypatch.setattr(network, "decoupled_step_", None)  # must not be called
    net, x, labels = unlike(change)
    check_visit(net, lambda net: net, random_batch(net, x, labels))


def test_hooks_of_modules_are_called():
    net, x, labels = make("linear")
    batch, called = random_batch(net, x, labels), []
    net.layers[1][0].register_forward_hook(lambda *args: called.append("linear"))
    net.layers[1][1].register_forward_pre_hook(lambda *args: called.append("activation"))
    net.visit_(*batch[:3], multiplier=batch.multiplier, **VISIT)
    assert called == ["linear", "activation"] * (VISIT["steps"] + 1)


OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "Adam": functools.partial(torch.optim.Adam, lr=0.1),
    "Nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.1),
}


@by_path
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(path, make_optimizer):
    """The step of any optimizer is the one that it makes of the gradients."""
    net, x, labels = make("linear")
    net, by_hand = path(net), copy.deepcopy(net)
    batch = random_batch(net, x, labels)
    same = batch.to(torch.float32)
    optimizer, other = make_optimizer(net.parameters()), make_optimizer(by_hand.parameters())
    for _ in range(3):
        net.visit_(*batch[:3], multiplier=batch.multiplier, optimizer=optimizer, **VISIT)
        by_hand.visit_(*same[:3], multiplier=same.multiplier, **VISIT)
        other.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name))
        assert not torch.equal(parameter, dict(make("linear")[0].named_parameters())[name])


def test_an_optimizer_of_some_parameters_moves_those():
    net, x, labels = make("linear")
    batch, before = random_batch(net, x, labels), copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.layers[1].parameters(), lr=0.1)
    net.visit_(*batch[:3], multiplier=batch.multiplier, optimizer=optimizer, **VISIT)
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["layers.1.0.weight", "layers.1.0.bias"]


@by_path
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_gradients_from_before_the_visit_move_nothing(path, make_optimizer):
    net, x, labels = make("linear")
    net, batch, other = path(net), random_batch(net, x, labels), nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    optimizer = make_optimizer([*net.parameters(), other])
    net.visit_(*batch[:3], multiplier=batch.multiplier, optimizer=optimizer, **VISIT)
    assert other.eq(1).all()


def test_hooks_of_the_optimizer_are_called():
    net, x, labels = make("linear")
    batch, called = random_batch(net, x, labels), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: called.append(net.layers[0][0].weight.grad is not None))
    net.visit_(*batch[:3], multiplier=batch.multiplier, optimizer=optimizer, **VISIT)
    assert called == [True]


def test_a_net_of_one_layer():
    """No hidden values: a visit is a step of backpropagation."""
    net, x, labels = lgd.DecoupledNetwork([nn.Linear(5, 3)]), torch.randn(N, 5), torch.randint(3, (N,))
    visit = net.visit_(x, [], labels, step_size=0.1)
    assert visit.energies.shape == (1,) and visit.residual_norm.shape == visit.value_norm.shape == (0,)
    got = net.layers[0][0].weight.grad.clone()
    net.zero_grad()
    net.loss(x, labels).backward()
    torch.testing.assert_close(got, net.layers[0][0].weight.grad)
    assert net.hidden_values(x) == [] and net.hidden_gradient(x, [], labels) == []
    assert net.largest_curvature(x, [], labels) == 0


@pytest.mark.parametrize("name", NETS)
def test_no_samples(name):
    net, x, labels = make(name)
    x, labels = x[:0], labels[:0]
    z = net.hidden_values(x)
    visit = net.visit_(x, z, labels, step_size=0.1, multiplier=[torch.zeros_like(value) for value in z])
    assert visit.energies.eq(0).all() and visit.residual_norm.eq(0).all()
    assert all(parameter.grad.eq(0).all() for parameter in net.parameters())
    assert net.loss(x, labels) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Values in 16 bits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_values_in_16_bits_are_taken_in_the_precision_of_the_parameters(dtype):
    net, x, labels = make("convolutions")
    batch = random_batch(net, x, labels)
    z, multiplier = ([value.to(dtype) for value in values] for values in (batch.z, batch.multiplier))
    wide = [value.float() for value in z]
    gradient = net.hidden_gradient(x, wide, labels, multiplier=[value.float() for value in multiplier])
    net.visit_(x, z, labels, multiplier=multiplier, step_size=0.1)
    for value, before, of_value in zip(z, wide, gradient, strict=True):
        assert torch.equal(value, before.sub(of_value, alpha=0.1).to(dtype))


@pytest.mark.parametrize("name", ["linear", "mixed"])
def test_bfloat16_values_of_linear_layers(name):
    """Products with operands in bfloat16: a relative error of 2^-8 in each of two."""
    net, x, labels = make(name)
    batch = random_batch(net, x, labels)
    narrow = batch.to(torch.bfloat16)._replace(x=x)
    wide = narrow.to(torch.float32)
    net.visit_(*narrow[:3], multiplier=narrow.multiplier, **VISIT)
    got = [parameter.grad for parameter in net.parameters()]
    net.visit_(*wide[:3], multiplier=wide.multiplier, **VISIT)
    for value, expected in zip(narrow.z, wide.z, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value - expected).norm() < 2**-6 * expected.norm()
    for gradient, parameter in zip(got, net.parameters(), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - parameter.grad).norm() < 2**-5 * parameter.grad.norm()


@by_path
def test_autocast(path):
    """Layers that are called by themselves follow it, with a relative error of 2^-8 for each rounding."""
    net, x, labels = make("convolutions")
    net, batch = path(net), random_batch(net, x, labels)
    exact = net.hidden_gradient(*batch[:3], multiplier=batch.multiplier)
    with torch.autocast(x.device.type, torch.bfloat16):
        rounded = net.hidden_gradient(*batch[:3], multiplier=batch.multiplier)
        net.visit_(*batch[:3], multiplier=batch.multiplier, **VISIT)
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).norm() < 2**-5 * b.norm()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# An ordinary module
# ---------------------------------------------------------------------------------------------------------------------


@by_net
def test_forward_is_the_ordinary_net(name):
    net, x, labels = make(name)
    modules, _ = NETS[name]
    torch.manual_seed(0)
    ordinary = nn.Sequential(*modules()).eval()
    ordinary.load_state_dict(dict(zip(ordinary.state_dict(), net.state_dict().values(), strict=True)))
    assert torch.equal(net(x), ordinary(x))
    torch.testing.assert_close(net.loss(x, labels), nn.functional.cross_entropy(ordinary(x), labels))
    for value, expected in zip(net.hidden_values(x), fed_forward(net, x), strict=False):
        assert torch.equal(value, expected) and not value.requires_grad


@by_net
def test_state_dict(name):
    net, x, _ = make(name, H=lgd.Infogain.dense(torch.rand(3, 3)))
    other, _, _ = make(name, H=lgd.Infogain.dense(torch.rand(3, 3)))
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))
    assert torch.equal(net.criterion.H.parts.matrix, other.criterion.H.parts.matrix)


@by_net
def test_export(name):
    net, x, _ = make(name)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), net(x), rtol=0, atol=0)


@by_net
def test_a_deep_copy_is_another_net(name):
    net, x, labels = make(name)
    other, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    batch = random_batch(net, x, labels)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other.visit_(*batch[:3], multiplier=batch.multiplier, optimizer=optimizer, **VISIT)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(not torch.equal(p, before[key]) for key, p in other.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_running_statistics_change_once_in_a_visit_and_in_no_question():
    net, x, labels = make("convolutions")
    net.train()
    norm = net.layers[0][1]
    batch = random_batch(net.eval(), x, labels)
    net.train()
    before = copy.deepcopy(norm.state_dict())
    given = {"multiplier": batch.multiplier}
    net.hidden_values(x)
    net.hidden_gradient(*batch[:3], **given)
    net.local_gradient_(*batch[:3], **given)
    net.largest_curvature(*batch[:3], **given)
    lgd.diagnostics.diagnose(net, *batch[:3], **given)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    net.visit_(*batch[:3], **given, **VISIT)
    expected = nn.BatchNorm2d(4).train()
    expected(net.layers[0][0](x))
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(norm.state_dict()[key], expected.state_dict()[key])


def test_inputs_are_not_written_to():
    """Blocks may begin with an activation in place."""
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5))
    net = lgd.DecoupledNetwork([nn.Linear(5, 5), block, copy.deepcopy(block), nn.Linear(5, 3)])
    x, labels = torch.randn(N, 5), torch.randint(3, (N,))
    z = net.hidden_values(x)
    assert any(value.lt(0).any() for value in z[:2])
    torch.testing.assert_close(z[0], net.layers[0](x))
    check_point_at = [value.clone() for value in z]
    net.hidden_gradient(x, z, labels)
    net.local_gradient_(x, z, labels)
    assert all(map(torch.equal, z, check_point_at))


def test_hidden_values_do_not_share_memory():
    """With each other, or with x: a visit moves each of them in place."""
    net = lgd.DecoupledNetwork([nn.Sequential(nn.Identity()), nn.Sequential(nn.Flatten()), nn.Linear(6, 3)])
    x, labels = torch.randn(N, 2, 3), torch.randint(3, (N,))
    z, before = net.hidden_values(x), x.clone()
    net.visit_(x, z, labels, step_size=0.1)
    assert torch.equal(x, before) and torch.equal(z[0], before)  # the first is its own target already
    assert not torch.equal(z[1], before.flatten(1))


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


def kinds(net):
    return [[type(module).__name__ for module in layer] for layer in net.layers]


def test_modules_become_layers():
    net = lgd.DecoupledNetwork(
        [
            *(nn.Flatten(), nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.PReLU()),
            *(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Dropout()),
            *(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), nn.Tanh()),
            *(nn.Sequential(nn.ReLU()), Residual(4), nn.Linear(4, 3)),
        ]
    )
    assert kinds(net) == [
        ["Flatten", "LayerNorm", "Dropout", "Linear", "BatchNorm1d", "PReLU"],
        ["Linear"],
        ["Linear", "ReLU", "Dropout"],
        ["Sequential", "Tanh"],
        ["Sequential"],
        ["Residual"],
        ["Linear"],
    ]


def test_parameters_of_a_residual_net():
    layers = residual_net(9, 25, 4, 3, "tanh")
    assert [tuple(layer.weight.shape) for layer in layers] == [(25, 9), (25, 25), (25, 25), (25, 25), (3, 25)]
    assert [layer.skip for layer in layers] == [0, 1, 1, 1, 0]
    assert [layer.branch_scale for layer in layers] == [1 / 3, 0.1, 0.1, 0.1, 0.2]
    assert [layer.activation for layer in layers] == ["identity", "tanh", "tanh", "tanh", "tanh"]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert abs(weights.mean()) < 4 / len(weights) ** 0.5 and abs(weights.std() - 1) < 4 / (2 * len(weights)) ** 0.5
    assert all(layer.bias.eq(0).all() for layer in layers)


@pytest.mark.parametrize("preactivation", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_block(preactivation, bias):
    block = LinearBlock(
        4, 4, activation="tanh", preactivation=preactivation, skip=0.5, branch_scale=0.3, bias=bias
    ).double()
    z = torch.randn(5, 4, dtype=torch.float64)
    if preactivation:
        expected = 0.5 * z + 0.3 * z.tanh() @ block.weight.T
    else:
        expected = 0.5 * z + (0.3 * z @ block.weight.T).tanh()
    torch.testing.assert_close(block(z), expected)  # the bias starts at 0
    assert (block.bias is not None) == bias


# ---------------------------------------------------------------------------------------------------------------------
# The size of the steps
# ---------------------------------------------------------------------------------------------------------------------


def test_largest_curvature_of_a_quadratic_energy():
    """Linear layers and a squared head: the Hessian is the same everywhere, and for every sample."""
    net = lgd.DecoupledNetwork([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)], head="squared").double()
    x, target = torch.randn(N, 3, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    A, B = net.layers[1][0].weight, net.layers[2][0].weight
    eye = torch.eye(4, dtype=torch.float64)
    hessian = torch.cat(
        [torch.cat([0.7 * (eye + A.T @ A), -0.7 * A.T], 1), torch.cat([-0.7 * A, 0.7 * eye + B.T @ B], 1)]
    )
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    z = net.hidden_values(x)
    got = net.largest_curvature(x, z, target, rho=0.7, iterations=300)
    assert got == pytest.approx(expected, rel=1e-6)
    assert net.largest_curvature(x, z, target, rho=0.7) == pytest.approx(expected, rel=0.1)


def test_largest_curvature_is_a_mean_over_the_samples():
    """Of what autograd says of every sample's Hessian, which differ: the tanh of some is saturated."""
    net = lgd.DecoupledNetwork([nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)]).double()
    x, labels = 3 * torch.randn(N, 3, dtype=torch.float64), torch.randint(2, (N,))
    z = [3 * torch.randn(N, 4, dtype=torch.float64) for _ in range(2)]
    curvatures = []
    for i in range(N):

        def energy(joined, i=i):
            *inputs, last = x[i : i + 1], *joined.split(4, dim=1)
            hidden = zip(net.layers[:-1], inputs, joined.split(4, dim=1), strict=True)
            energies = [0.5 * (value - layer(given)).square().sum() for layer, given, value in hidden]
            return sum(energies) + CROSS_ENTROPY(net.layers[-1](last), labels[i : i + 1])

        here = torch.cat([value[i : i + 1] for value in z], 1)
        hessian = torch.autograd.functional.hessian(energy, here).reshape(8, 8)
        curvatures.append(torch.linalg.eigvalsh(hessian).abs().max())
    expected = torch.stack(curvatures)
    assert expected.std() > 0.1 * expected.mean()
    got = net.largest_curvature(x, z, labels, iterations=300)
    assert got == pytest.approx(expected.mean().item(), rel=0.01)  # its difference quotients have steps of 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {}, TypeError, "modules: expected a list of torch.nn.Modules, got Linear"),
        ([nn.Linear(2, 2), torch.tanh], {}, TypeError, r"modules\[1\]: expected a torch.nn.Module, got builtin"),
        ([nn.Tanh()], {}, ValueError, "modules: expected at least 1 layer with parameters, got 1 modules without any"),
        ([nn.Linear(2, 2)], {"head": "mse"}, ValueError, "head: unknown value 'mse'"),
        ([nn.Linear(2, 2)], {"hidden_loss": "l1"}, ValueError, "hidden_loss: unknown value 'l1'"),
        ([nn.Linear(2, 2)], {"kappa": 0.0}, ValueError, "kappa: must be positive, got 0.0"),
        ([nn.Linear(2, 2)], {"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float 1.5"),
        ([nn.Linear(2, 2)], {"H": torch.eye(2)}, TypeError, "H: expected an lgd.Infogain or None, got Tensor"),
        (
            [nn.Linear(2, 2)],
            {"head": "squared", "H": lgd.Infogain.identity(2)},
            ValueError,
            "H: .* needs head='softmax_infogain', got head='squared'",
        ),
    ],
)
def test_refused_nets(modules, options, error, message):
    with pytest.raises(error, match=message):
        lgd.DecoupledNetwork(modules, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "sine"}, ValueError, "activation: unknown value 'sine'"),
        ({"preactivation": 1}, TypeError, "preactivation: expected True or False, got int 1"),
        ({"skip": 1.0}, ValueError, "skip: is 1.0, which needs d_in == d_out, got 4 and 3"),
        ({"branch_scale": float("inf")}, ValueError, "branch_scale: must be finite, got inf"),
    ],
)
def test_refused_blocks(options, error, message):
    valid = {"activation": "tanh", "preactivation": True, "skip": 0.0, "branch_scale": 1.0}
    with pytest.raises(error, match=message):
        LinearBlock(4, 3, **(valid | options))


def test_refused_sizes_of_a_residual_net():
    with pytest.raises(ValueError, match="depth: must be at least 1, got 0"):
        residual_net(4, 4, 0, 3)
    with pytest.raises(TypeError, match=r"width: expected an int, got float 4\.0"):
        residual_net(4, 4.0, 2, 3)


def wrong(batch, name, change):
    return batch._replace(**{name: change(getattr(batch, name))})


@by_path
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda x: x.tolist(), TypeError, "x: expected a torch.Tensor, got list"),
        ("z", torch.stack, TypeError, "z: expected a list of tensors, got Tensor"),
        ("z", lambda z: z[:1], ValueError, "z: has 1 tensors, but a net of 3 layers has 2 hidden values"),
        ("z", lambda z: [z[0], None], TypeError, r"z\[1\]: expected a torch.Tensor, got NoneType"),
        ("z", lambda z: [z[0], z[1][:4]], ValueError, r"z\[1\]: has shape \(4, 5\), but x has shape \(6, 5\)"),
        (
            "multiplier",
            lambda m: [m[0], m[1][:, :3]],
            ValueError,
            r"multiplier\[1\]: has shape \(6, 3\), but z\[1\] has \(6, 5\)",
        ),
        ("multiplier", lambda m: m[0], TypeError, "multiplier: expected a list of tensors, got Tensor"),
    ],
)
def test_refused_values(path, name, change, error, message):
    net = path(lgd.DecoupledNetwork([nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)]))
    batch = random_batch(net, torch.randn(N, 5), torch.randint(3, (N,)))
    batch = wrong(batch, name, change)
    for call in (net.hidden_gradient, net.local_gradient_, functools.partial(net.visit_, step_size=0.1)):
        with pytest.raises(error, match=message):
            call(*batch[:3], multiplier=batch.multiplier)


def test_values_of_the_wrong_width():
    net = lgd.DecoupledNetwork([nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)])
    x, labels, z = torch.randn(N, 5), torch.randint(3, (N,)), [torch.randn(N, 4), torch.randn(N, 5)]
    with pytest.raises(
        ValueError, match=r"z\[1\]: expected shape \(6, 4\), which layer 1 makes of \(6, 4\), got \(6, 5\)"
    ):
        net.hidden_gradient(x, z, labels)
    with pytest.raises(ValueError, match=r"z: layer 1 has shape \(6, 5\), but .* it must be \(6, 4\)"):
        net.visit_(x, z, labels, step_size=0.1)
    with pytest.raises(ValueError, match=r"x: has shape \(6, 4\), but layer 0 has 5 inputs"):
        net.hidden_gradient(x[:, :4], z, labels)
    with pytest.raises(
        ValueError, match=r"z\[1\]: expected shape \(6, 4\), which layer 1 makes of \(6, 4\), got \(6, 5\)"
    ):
        unfused(net).hidden_gradient(x, z, labels)


@by_path
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: must not be negative, got -1"),
        ({"steps": 1.0}, TypeError, r"steps: expected an int, got float 1\.0"),
        ({"step_size": -0.1}, ValueError, "step_size: must not be negative, got -0.1"),
        ({"step_size": float("nan")}, ValueError, "step_size: must be finite, got nan"),
        ({"dual_step": -0.1}, ValueError, "dual_step: must not be negative, got -0.1"),
        ({"rho": -1.0}, ValueError, "rho: must not be negative, got -1.0"),
        ({"rho": [1.0]}, ValueError, "rho: has 1 values, but there are 2 hidden values"),
    ],
)
def test_refused_numbers(path, options, error, message):
    net, x, labels = make("linear")
    net, batch = path(net), random_batch(net, x, labels)
    before = batch.to(torch.float32)
    with pytest.raises(error, match=message):
        net.visit_(*batch[:3], multiplier=batch.multiplier, **({"step_size": 0.1} | options))
    assert all(map(torch.equal, batch.z, before.z)) and all(map(torch.equal, batch.multiplier, before.multiplier))


def test_refused_iterations():
    net, x, labels = make("linear")
    with pytest.raises(ValueError, match="iterations: must be at least 1, got 0"):
        net.largest_curvature(x, net.hidden_values(x), labels, iterations=0)


def test_refused_target_of_a_squared_head():
    net, x, _ = make("linear", head="squared")
    message = r"target: expected the shape of the output \(6, 3\), got \(6, 1\)"
    with pytest.raises(ValueError, match=message):
        net.loss(x, torch.randn(N, 1))
    with pytest.raises(ValueError, match=message):
        net.hidden_gradient(x, net.hidden_values(x), torch.randn(N, 1))


def test_rates_of_weights_and_biases():
    """Every parameter once; and one step of Adam has the size of its rate."""
    blocks = residual_net(4, 6, 3, 2)
    without = LinearBlock(2, 2, activation="tanh", preactivation=False, skip=0.0, branch_scale=0.5, bias=False)
    net = lgd.DecoupledNetwork([*blocks, without, nn.Linear(2, 2)])
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(parameter_groups(net, 0.25))
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    steps = [float((b - p.detach()).mean()) for b, p in zip(before, net.parameters(), strict=True)]
    hidden = 0.25 / 18**0.5  # the rate times the branch scale 1 / sqrt(width depth)
    of_blocks = [0.25, 0.25 / 2, 0.25, hidden, 0.25, hidden, 0.25, 0.25 / 6**0.5]
    assert steps == pytest.approx([*of_blocks, 0.25, 0.25, 0.25], rel=1e-5)
